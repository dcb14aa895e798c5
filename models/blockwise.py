"""Attention in blocks of queries, for CPUs.

Each block of queries meets only the keys that its mask can reach, as plain batched matrix products, which run at the
machine's GEMM rate; torch's fused CPU kernel reaches a quarter of it in bf16 and half in fp32. As in FlashAttention-2
(Dao, 2023) only the log-sum-exp is kept, and backward makes the probabilities again. A sink is a score without a value:
with it in the log-sum-exp, all other formulas stay as they are.

Shapes: B sequences, T tokens, H query heads, K key-value heads, G = H / K queries per key, d width of a query or key
head, e of a value head. Inside, tensors are (B · K, G, rows, d), so that the heads of a group share one product.
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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Mask, scale: float) -> Tensor:
        batch, length, heads, _ = q.shape
        groups = k.shape[2]
        qs, ks, vs = _grouped(q, groups), _grouped(k, groups), _grouped(v, groups)
        out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype)
        lse = torch.empty(batch * groups, heads // groups, length, dtype=_precise(q.dtype))
        keys = ks[:, 0].to(lse.dtype)
        for first in range(0, length, _ROWS):
            last = min(first + _ROWS, length)
            low = mask.first_key(first)
            scores = _scores(qs[:, :, first:last], keys[:, low:last], mask, first, low, scale)
            peak = scores.amax(dim=-1, keepdim=True)
            sink = None if sinks is None else _per_row(sinks, batch, groups, last - first).to(lse.dtype)
            if sink is not None:
                peak = torch.maximum(peak, sink)
            total = scores.sub_(peak).exp_().sum(dim=-1, keepdim=True)
            if sink is not None:
                total.add_(sink.sub_(peak).exp_())
            y = torch.bmm(scores.to(v.dtype), vs[:, 0, low:last]).div_(total.to(v.dtype))
            out[:, first:last] = _ungrouped(y, batch, last - first)
            lse[:, :, first:last] = peak.add_(total.log_()).view(batch * groups, -1, last - first)
        ctx.mask, ctx.scale = mask, scale
        ctx.save_for_backward(qs, ks, vs, sinks, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        qs, ks, vs, sinks, out, lse = ctx.saved_tensors
        mask: Mask = ctx.mask
        batch, length, heads, width = out.shape
        groups = ks.shape[0] // batch
        dq = torch.empty(batch, length, heads, qs.shape[-1], dtype=out.dtype)
        dk = torch.zeros(ks.shape[0], length, ks.shape[-1], dtype=lse.dtype)
        dv = torch.zeros(ks.shape[0], length, width, dtype=lse.dtype)
        douts = _grouped(dout, groups)
        # Row sums of dP · P, from the output alone (FlashAttention, appendix B.4).
        delta = (dout.to(lse.dtype) * out).sum(dim=-1).transpose(1, 2).reshape(lse.shape)
        keys = ks[:, 0].to(lse.dtype)
        for first in range(0, length, _ROWS):
            last = min(first + _ROWS, length)
            low = mask.first_key(first)
            block = slice(first, last)
            probs = _scores(qs[:, :, block], keys[:, low:last], mask, first, low, ctx.scale)
            probs.sub_(lse[:, :, block].flatten(1)[..., None]).exp_()
            dy = douts[:, :, block].flatten(1, 2)
            dv[:, low:last] += torch.bmm(probs.to(dy.dtype).transpose(1, 2), dy)
            dscores = torch.bmm(dy, vs[:, 0, low:last].transpose(1, 2)).to(lse.dtype)
            dscores.sub_(delta[:, :, block].flatten(1)[..., None]).mul_(probs)
            ds = dscores.to(dy.dtype)
            dq[:, block] = _ungrouped(torch.bmm(ds, ks[:, 0, low:last]), batch, last - first)
            dk[:, low:last] += torch.bmm(ds.transpose(1, 2), qs[:, :, block].flatten(1, 2))
        dk, dv = (x.view(batch, groups, length, -1).transpose(1, 2).to(out.dtype) for x in (dk.mul_(ctx.scale), dv))
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # A sink's dP is zero: it has no value.
            probs = (_per_row(sinks, batch, groups, 1).to(lse.dtype) - lse).exp_()
            dsinks = probs.mul_(delta).view(batch, heads, length).sum((0, 2)).neg_().to(sinks.dtype)
        return dq.mul_(ctx.scale), dk, dv, dsinks, None, None


def _per_row(sinks: Tensor, batch: int, groups: int, rows: int) -> Tensor:
    """(H,) → (B · K, G · rows, 1)."""
    return sinks.view(1, groups, -1, 1).expand(batch, -1, -1, rows).reshape(batch * groups, -1, 1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, T, H, d) → (B · K, H / K, T, d), contiguous."""
    batch, length, heads, width = x.shape
    return x.transpose(1, 2).reshape(batch * groups, heads // groups, length, width).contiguous()


def _ungrouped(y: Tensor, batch: int, rows: int) -> Tensor:
    """(B · K, G · rows, d) → (B, rows, H, d)."""
    return y.view(batch, -1, rows, y.shape[-1]).transpose(1, 2)


def _scores(q: Tensor, keys: Tensor, mask: Mask, first: int, low: int, scale: float) -> Tensor:
    """Masked scaled scores (B · K, G · rows, keys) of the block of queries q (B · K, G, rows, d) from `first` on."""
    rows = q.shape[-2]
    scores = torch.bmm(q.flatten(1, 2).to(keys.dtype).mul(scale), keys.transpose(1, 2))
    hidden, start = mask.hidden(first, first + rows, low, low + keys.shape[1])
    sequences = hidden.shape[0]
    scores.view(sequences, -1, rows, keys.shape[1])[..., start:].masked_fill_(hidden[:, None], float("-inf"))
    return scores


def blockwise(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """q (B, T, H, d), k (B, T, K, d) and v (B, T, K, e) → (B, T, H, e).

    Scores are fp32 for bf16 inputs, the products with probabilities bf16.

    Args:
        scale: multiplier of the scores; none: 1 / sqrt(d).
        sinks: (H,) scores that join each softmax of their head and have no value.
    """
    return _Blockwise.apply(q, k, v, sinks, mask, q.shape[-1] ** -0.5 if scale is None else scale)
