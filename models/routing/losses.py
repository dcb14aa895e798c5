"""Losses that keep the experts' load even, and how they join the training loss.

Every device adds up the part of its own tokens; loads are those of the whole microbatch, whoever has its tokens. The
sum over devices and microbatches is thus the same however these are dealt out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...configs.schema import MoeConfig
from ...parallel.expert.tokens import TokenPool
from ..sequences import Sequences
from .choice import choices_of


@dataclass(frozen=True)
class Losses:
    """One layer's part of the losses over this device's tokens (scalars), without their coefficients.

    Args:
        balance: 1 in all where the load is even; none: not wanted.
        z: mean square of the log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, section 3.2).
    """

    balance: Tensor | None
    z: Tensor


def fractions(chosen: Tensor, seq: Sequences, tokens: TokenPool, moe: MoeConfig, load: Tensor | None) -> Tensor:
    """The load of each choice, as fractions whose sum is 1: (C,), or (B, C) for each sequence of the microbatch.

    A null expert's load is the mean of theirs (AdaMoE, arXiv 2406.13233, section 3.3): which one is taken means
    nothing.

    Args:
        chosen: (n, K) the choices with the best scores.
        tokens: the devices that have the other tokens.
        load: (C,) that of the step before, zeros before the first; used by aux_level=global_batch.
    """
    count = choices_of(moe)
    if load is not None:
        even = torch.full_like(load, 1 / count)
        shares = torch.where(load.sum() > 0, load, even)
    else:
        assert seq.rows is not None
        each = moe.router.aux_level == "sequence"
        bins = chosen + seq.rows.unsqueeze(-1) * count if each else chosen
        size = count * seq.batch if each else count
        counts = count_of(bins.reshape(-1), size)
        counts = tokens.sum(counts).view(-1, count) if each else tokens.sum(counts)
        shares = counts / counts.sum(-1, keepdim=True)
    if moe.router.null_experts:
        null = shares[..., moe.experts :]
        shares = torch.cat((shares[..., : moe.experts], null.mean(-1, keepdim=True).expand_as(null)), -1)
    return shares


def count_of(bins: Tensor, size: int) -> Tensor:
    """(size,) how often each of 0 … size − 1 stands in `bins`, as fp64."""
    counts = torch.zeros(size, dtype=torch.float64, device=bins.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))


def probabilities(scores: Tensor, score: str) -> Tensor:
    """Scores (n, C) that sum to 1 for each token."""
    return scores if score == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)


def losses(logits: Tensor, shares: Tensor | None, loads: Tensor | None, seq: Sequences, tokens: int) -> Losses:
    """This device's part of the layer's losses.

    With f the loads and P the mean probabilities the balancing loss is C · Σ f P (Switch Transformer, arXiv
    2101.03961, section 2.2), where each sequence has its own f and P with loads (B, C) (DeepSeek-V3, section 2.1.2).

    Args:
        logits: (n, C).
        shares: (n, C) scores that sum to 1 for each token.
        loads: as of `fractions`; without them or shares there is no balancing loss.
        tokens: of the whole microbatch.
    """
    z = torch.logsumexp(logits, -1).square().sum() / tokens
    if loads is None or shares is None:
        return Losses(None, z)
    loads = loads.to(shares.dtype)
    if loads.ndim == 1:
        balance = (shares.sum(0) * loads).sum()
    else:
        assert seq.rows is not None
        balance = (shares * loads[seq.rows]).sum()
    return Losses(balance * (logits.shape[1] / tokens), z)


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """x, whose backward also runs that of `loss` (a scalar), as if it had been added to the training loss."""
    return _Attach.apply(x, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, ctx.like
