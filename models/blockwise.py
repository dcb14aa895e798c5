"""Attention in blocks of queries, for CPUs.

Each block of queries meets only the keys that its mask can reach, as plain batched matrix products, which run at the
machine's GEMM rate; torch's fused CPU kernel reaches a quarter of it in bf16 and half in fp32. As in FlashAttention-2
(Dao, 2023) only the log-sum-exp is kept, and backward makes the probabilities again.

Shapes: B sequences, T tokens, H query heads, K key-value heads, G = H / K queries per key, d head width. Inside, a
sequence's tensors are (K, G · rows, d), so that the heads of a group share one product.
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


def _heads_first(x: Tensor) -> Tensor:
    """(B, T, H, d) → (B, H, T, d), contiguous."""
    return x.transpose(1, 2).contiguous()


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        qs, ks, vs = _heads_first(q), _heads_first(k), _heads_first(v)
        batch, heads, length, width = qs.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(batch, heads, length, dtype=_precise(q.dtype))
        for b in range(batch):
            keys = ks[b].to(lse.dtype)
            for first in range(0, length, _ROWS):
                last = min(first + _ROWS, length)
                low = mask.first_key(first)
                scores = _scores(qs[b, :, first:last], keys[:, low:last], mask, b, first, low)
                peak = scores.amax(dim=-1, keepdim=True)
                total = scores.sub_(peak).exp_().sum(dim=-1, keepdim=True)
                y = torch.bmm(scores.to(v.dtype), vs[b, :, low:last])
                y = (y.to(lse.dtype) if y.dtype != lse.dtype else y).div_(total)
                out[b, first:last] = y.view(heads, last - first, width).transpose(0, 1)
                lse[b, :, first:last] = peak.add_(total.log_()).view(heads, -1)
        ctx.mask = mask
        ctx.save_for_backward(qs, ks, vs, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        qs, ks, vs, out, lse = ctx.saved_tensors
        mask: Mask = ctx.mask
        batch, heads, length, width = qs.shape
        groups = ks.shape[1]
        dq = torch.empty(batch, length, heads, width, dtype=qs.dtype)
        dk = torch.zeros(ks.shape, dtype=lse.dtype)
        dv = torch.zeros(ks.shape, dtype=lse.dtype)
        douts = _heads_first(dout)
        # Row sums of dP · P, from the output alone (FlashAttention, appendix B.4).
        delta = (dout.to(lse.dtype) * out).sum(dim=-1).transpose(1, 2).contiguous()
        scale = width**-0.5
        for b in range(batch):
            keys = ks[b].to(lse.dtype)
            for first in range(0, length, _ROWS):
                last = min(first + _ROWS, length)
                low = mask.first_key(first)
                probs = _scores(qs[b, :, first:last], keys[:, low:last], mask, b, first, low)
                probs.sub_(lse[b, :, first:last].reshape(groups, -1, 1)).exp_()
                dy = douts[b, :, first:last].reshape(groups, -1, width)
                _accumulate(dv[b, :, low:last], probs.to(dy.dtype).transpose(1, 2), dy)
                dscores = torch.bmm(dy, vs[b, :, low:last].transpose(1, 2)).to(lse.dtype)
                dscores.sub_(delta[b, :, first:last].reshape(groups, -1, 1)).mul_(probs)
                ds = dscores.to(dy.dtype)
                rows = torch.bmm(ds, ks[b, :, low:last]).mul_(scale)
                dq[b, first:last] = rows.view(heads, last - first, width).transpose(0, 1)
                query = qs[b, :, first:last].reshape(groups, -1, width)
                _accumulate(dk[b, :, low:last], ds.transpose(1, 2), query)
        dk.mul_(scale)
        return dq, dk.transpose(1, 2).to(qs.dtype), dv.transpose(1, 2).to(qs.dtype), None


def _scores(q: Tensor, keys: Tensor, mask: Mask, sequence: int, first: int, low: int) -> Tensor:
    """Masked scaled scores (K, G · rows, keys) of the block of queries q (H, rows, d) that starts at `first`."""
    groups, count, width = keys.shape
    rows = q.shape[1]
    query = q.reshape(groups, -1, width).to(keys.dtype)
    scores = torch.bmm(query * width**-0.5, keys.transpose(1, 2))
    hidden, start = mask.hidden(sequence, first, first + rows, low, low + count)
    if hidden is not None:
        scores.view(groups, -1, rows, count)[..., start:].masked_fill_(hidden, float("-inf"))
    return scores


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the precision of total."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def blockwise(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q (B, T, H, d), k and v (B, T, K, d) → (B, T, H, d), scaled by 1 / sqrt(d).

    Scores are fp32 for bf16 inputs, the products with probabilities bf16.
    """
    return _Blockwise.apply(q, k, v, mask)
