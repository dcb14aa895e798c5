"""Attention in blocks of queries, for CPUs.

Each block of queries meets only the keys that its mask can reach, as plain batched matrix products, which run at the
machine's GEMM rate; torch's fused CPU kernel reaches a quarter of it in bf16 and half in fp32. As in FlashAttention-2
(Dao, 2023) only the log-sum-exp is kept, and backward makes the probabilities again.

Shapes: B sequences, T tokens, H query heads, K key-value heads, G = H / K queries per key, d head width. Inside,
tensors are (B · K, G, rows, d), so that the heads of a group share one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .masks import Mask

_ROWS = 64
"""Queries per block: with fp32 scores of a few heads the block stays in a core's cache."""


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        batch, length, heads, width = q.shape
        groups = k.shape[2]
        qs, ks, vs = _grouped(q, groups), _grouped(k, groups), _grouped(v, groups)
        out = torch.empty(batch, length, heads, width, dtype=q.dtype)
        lse = torch.empty(batch * groups, heads // groups, length, dtype=_precise(q.dtype))
        keys = ks[:, 0].to(lse.dtype)
        for first in range(0, length, _ROWS):
            last = min(first + _ROWS, length)
            low = mask.first_key(first)
            scores = _scores(qs[:, :, first:last], keys[:, low:last], mask, first, low)
            peak = scores.amax(dim=-1, keepdim=True)
            total = scores.sub_(peak).exp_().sum(dim=-1, keepdim=True)
            y = torch.bmm(scores.to(v.dtype), vs[:, 0, low:last]).div_(total.to(v.dtype))
            out[:, first:last] = _ungrouped(y, batch, last - first)
            lse[:, :, first:last] = peak.add_(total.log_()).view(batch * groups, -1, last - first)
        ctx.mask = mask
        ctx.save_for_backward(qs, ks, vs, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        qs, ks, vs, out, lse = ctx.saved_tensors
        mask: Mask = ctx.mask
        batch, length, _, width = out.shape
        groups = ks.shape[0] // batch
        dq = torch.empty_like(out)
        dk = torch.zeros(ks.shape[0], length, width, dtype=lse.dtype)
        dv = torch.zeros_like(dk)
        douts = _grouped(dout, groups)
        # Row sums of dP · P, from the output alone (FlashAttention, appendix B.4).
        delta = (dout.to(lse.dtype) * out).sum(dim=-1).transpose(1, 2).reshape(lse.shape)
        keys = ks[:, 0].to(lse.dtype)
        for first in range(0, length, _ROWS):
            last = min(first + _ROWS, length)
            low = mask.first_key(first)
            block = slice(first, last)
            probs = _scores(qs[:, :, block], keys[:, low:last], mask, first, low)
            probs.sub_(lse[:, :, block].flatten(1)[..., None]).exp_()
            dy = douts[:, :, block].flatten(1, 2)
            dv[:, low:last] += torch.bmm(probs.to(dy.dtype).transpose(1, 2), dy)
            dscores = torch.bmm(dy, vs[:, 0, low:last].transpose(1, 2)).to(lse.dtype)
            dscores.sub_(delta[:, :, block].flatten(1)[..., None]).mul_(probs)
            ds = dscores.to(dy.dtype)
            dq[:, block] = _ungrouped(torch.bmm(ds, ks[:, 0, low:last]), batch, last - first)
            dk[:, low:last] += torch.bmm(ds.transpose(1, 2), qs[:, :, block].flatten(1, 2))
        scale = width**-0.5
        shape = (batch, groups, length, width)
        dk, dv = (x.view(shape).transpose(1, 2).to(out.dtype) for x in (dk.mul_(scale), dv))
        return dq.mul_(scale), dk, dv, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, T, H, d) → (B · K, H / K, T, d), contiguous."""
    batch, length, heads, width = x.shape
    return x.transpose(1, 2).reshape(batch * groups, heads // groups, length, width).contiguous()


def _ungrouped(y: Tensor, batch: int, rows: int) -> Tensor:
    """(B · K, G · rows, d) → (B, rows, H, d)."""
    return y.view(batch, -1, rows, y.shape[-1]).transpose(1, 2)


def _scores(q: Tensor, keys: Tensor, mask: Mask, first: int, low: int) -> Tensor:
    """Masked scaled scores (B · K, G · rows, keys) of the block of queries q (B · K, G, rows, d) from `first` on."""
    rows, width = q.shape[-2:]
    scores = torch.bmm(q.flatten(1, 2).to(keys.dtype).mul(width**-0.5), keys.transpose(1, 2))
    hidden, start = mask.hidden(first, first + rows, low, low + keys.shape[1])
    sequences = hidden.shape[0]
    scores.view(sequences, -1, rows, keys.shape[1])[..., start:].masked_fill_(hidden[:, None], float("-inf"))
    return scores


def blockwise(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q (B, T, H, d), k and v (B, T, K, d) → (B, T, H, d), scaled by 1 / sqrt(d).

    Scores are fp32 for bf16 inputs, the products with probabilities bf16.
    """
    return _Blockwise.apply(q, k, v, mask)
