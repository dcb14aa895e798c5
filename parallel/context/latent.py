"""Context parallelism of latent attention: what is gathered is narrow, and becomes keys and values here.

    forward     all-gather latent ‖ rotary key      of each rank's tokens: expand, attend, merge
    backward    all-gather latent ‖ rotary key      of each rank's tokens: expand, differentiate down to the latent;
                                                    the latents' gradients are summed where these are at home

With b sequences of s tokens on each of P ranks, a rank sends (P − 1) · b · s · (r / tp + p) elements three times, where
the keys and values of its H heads would be H · (d + e) a token: for DeepSeek-V3 576 instead of 40,960. In exchange
every rank expands all tokens, one rank's at a time, so that no more than those keys and values exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..collectives import all_gather, all_to_all
from ..gradients import at_once
from ..mesh import Axis
from .local import LocalAttention
from .merge import merge_, precise
from .rows import Mask, Spread


class GatherLatent:
    """A `local.LatentCore`: the latents of all ranks are gathered, again in backward.

    Args:
        axis: the ranks that share the sequences.
        local: attention of one device.
    """

    def __init__(self, axis: Axis, local: LocalAttention) -> None:
        self._axis, self._local = axis, local

    def __call__(
        self,
        q: Tensor,
        latent: Tensor,
        turning: Tensor,
        up: nn.Module,
        keys_values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        spread: Spread,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """See `LatentCore`. Saved for backward: q, latent, turning, out and lse of this rank's tokens.

        The weight of `up` gets as many gradients a micro-batch as there are ranks (`Slot.uses`).
        """
        job = _Job(self._axis, self._local, up, keys_values, spread, window, scale)
        return _Attention.apply(q, latent, turning, job)


@dataclass(frozen=True)
class _Job:
    """One layer's attention; the arguments of `GatherLatent` and of its calls."""

    axis: Axis
    local: LocalAttention
    up: nn.Module
    keys_values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    spread: Spread
    window: int | None
    scale: float

    def expand(self, latent: Tensor, turning: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one rank's tokens."""
        return self.keys_values(self.up(latent), turning)

    def blocks(self, latent: Tensor, turning: Tensor) -> Iterator[tuple[int, Mask, Tensor, Tensor]]:
        """(rank, mask, latent, turning) of each rank's tokens; this one's first, while the others' arrive."""
        arriving = [all_gather(x, self.axis) for x in (latent, turning)]
        mine = self.axis.rank
        yield mine, self._mask(mine), latent, turning
        latents, turnings = (handle.wait().unflatten(0, (self.axis.size, -1)) for handle in arriving)
        for rank in range(self.axis.size):
            if rank != mine:
                yield rank, self._mask(rank), latents[rank], turnings[rank]

    def _mask(self, rank: int) -> Mask:
        return self.spread.once(Mask, self.spread.mine, self.spread.ranks[rank], self.window)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, latent: Tensor, turning: Tensor, job: _Job) -> Tensor:
        out = lse = None
        for _, mask, low, turned in job.blocks(latent, turning):
            found, sums = job.local.forward(q, *job.expand(low, turned), mask, job.scale)
            if out is None or lse is None:
                out, lse = found.to(precise(q.dtype)), sums
            else:
                merge_(out, lse, found, sums)
        assert out is not None
        out = out.to(q.dtype)
        ctx.job = job
        ctx.save_for_backward(q, latent, turning, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, latent, turning, out, lse = ctx.saved_tensors
        job: _Job = ctx.job
        dq = torch.zeros_like(q, dtype=lse.dtype)
        gradients = [x.new_empty(job.axis.size, *x.shape) for x in (latent, turning)]
        for rank, mask, *narrow in job.blocks(latent, turning):
            narrow = [x.detach().requires_grad_() for x in narrow]
            with torch.enable_grad():
                k, v = job.expand(*narrow)
            part, dk, dv = job.local.backward(dout, q, k.detach(), v.detach(), out, lse, mask, job.scale)
            dq += part
            # Not deferred: the weight's gradients would keep the keys and values of all ranks until then.
            with at_once(job.up.parameters()):
                torch.autograd.backward((k, v), (dk.to(k.dtype), dv.to(v.dtype)))
            for gradient, x in zip(gradients, narrow, strict=True):
                assert x.grad is not None
                gradient[rank] = x.grad
        dlatent, dturning = (_summed_at_home(gradient, job.axis) for gradient in gradients)
        return dq.to(q.dtype), dlatent, dturning, None


def _summed_at_home(gradient: Tensor, axis: Axis) -> Tensor:
    """(P, …) gradients of every rank's tokens → the sum of this rank's over all ranks, added in fp32 at least."""
    parts = all_to_all(gradient, axis).wait()
    return parts.sum(dim=0, dtype=precise(gradient.dtype)).to(gradient.dtype)
