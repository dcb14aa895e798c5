"""Attention in blocks of queries, for CPUs.

Each block of queries meets only the keys that its mask can reach, as plain batched matrix products over all sequences
and heads at once, which run at the machine's GEMM rate also where blocks are small or masked. As in FlashAttention-2
(Dao, 2023) only the log-sum-exp is kept, and backward makes the probabilities again.

Shapes: B sequences, n queries, m keys, H query heads, K key-value heads, G = H / K queries per key, d width of a query
or key head, e of a value head. Inside, tensors are (B · K, G · rows, d), so that the heads of a group share one
product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mask import Mask, TokenIndex
from .merge import row_sums
from .precision import precise

_ROWS = 64
"""Queries per block: with fp32 scores of a few heads the block stays in a core's cache."""


@dataclass(frozen=True)
class QueryBlock:
    """The queries [first, last) and the keys [low, high) that some of them see; all see those before `start`.

    Where they see none, low = start = high.
    """

    first: int
    last: int
    low: int
    start: int
    high: int


def blocks(queries: TokenIndex, keys: TokenIndex, window: int | None, size: int = _ROWS) -> list[QueryBlock]:
    """What each `size` queries see of the keys. Sequences of a batch share the ranges."""
    mask, found = Mask(queries, keys, window), []
    for first in range(0, queries.count, size):
        last = min(first + size, queries.count)
        low, high, start = mask.reach(first, last)
        if start == low < high:
            # Windows and documents say only here what the block sees.
            hidden = mask.hidden(first, last, low, high)
            seen = (~hidden.all(dim=1).all(dim=0)).nonzero()
            some = hidden.any(dim=1).any(dim=0)
            high, low = (low + int(seen[-1]) + 1, low + int(seen[0])) if len(seen) else (low, low)
            partial = some[low - start : high - start].nonzero()
            start = low + int(partial[0]) if len(partial) else high
        low = min(low, high)
        found.append(QueryBlock(first, last, low, max(low, min(start, high)), high))
    return found


class Blockwise:
    """A `LocalAttention` for CPUs: scores are fp32 for bf16 inputs, the products with probabilities bf16."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """out (B, n, H, e) in q's type and lse (B, H, n)."""
        batch, length, heads, _ = q.shape
        groups = k.shape[2]
        keys, values = _by_head(k).to(precise(q.dtype)), _by_head(v)
        out = q.new_empty(batch, length, heads, v.shape[-1])
        lse = keys.new_empty(batch * groups, heads // groups, length)
        for block in mask.once(blocks, mask.queries, mask.keys, mask.window):
            rows, low, high = slice(block.first, block.last), block.low, block.high
            if low == high:
                out[:, rows], lse[:, :, rows] = 0, float("-inf")
                continue
            scores = _scores(_grouped(q[:, rows], groups), keys[:, low:high], mask, block, scale)
            # A query that sees nothing has the total 0; the others at least the 1 of their largest score.
            peak = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            total = scores.sub_(peak).exp_().sum(dim=-1, keepdim=True)
            y = torch.bmm(scores.to(v.dtype), values[:, low:high]).div_(total.clamp(min=1))
            out[:, rows] = _ungrouped(y, batch, block.last - block.first)
            lse[:, :, rows] = peak.add_(total.log_()).view(batch * groups, -1, block.last - block.first)
        return out, lse.view(batch, heads, length)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in lse's precision; dk and dv have their heads before their tokens in memory."""
        batch, length, heads, _ = q.shape
        groups = k.shape[2]
        dq = lse.new_zeros(q.shape)
        dk, dv = (lse.new_zeros(batch * groups, k.shape[1], x.shape[-1]) for x in (k, v))
        plain_keys, values = _by_head(k), _by_head(v)
        keys = plain_keys.to(lse.dtype)
        shape = (batch * groups, heads // groups, length)
        delta = row_sums(dout, out).reshape(shape)
        # A query that sees nothing has the probabilities exp(… − inf) = 0.
        lse = lse.masked_fill(lse == float("-inf"), float("inf")).view(shape)
        for block in mask.once(blocks, mask.queries, mask.keys, mask.window):
            rows, low, high = slice(block.first, block.last), block.low, block.high
            if low == high:
                continue
            x = _grouped(q[:, rows], groups)
            probs = _scores(x, keys[:, low:high], mask, block, scale)
            probs.sub_(lse[:, :, rows].flatten(1)[..., None]).exp_()
            dy = _grouped(dout[:, rows], groups)
            dv[:, low:high] += torch.bmm(probs.to(dy.dtype).transpose(1, 2), dy)
            dscores = torch.bmm(dy, values[:, low:high].transpose(1, 2)).to(lse.dtype)
            dscores.sub_(delta[:, :, rows].flatten(1)[..., None]).mul_(probs)
            ds = dscores.to(dy.dtype)
            dq[:, rows] = _ungrouped(torch.bmm(ds, plain_keys[:, low:high]), batch, block.last - block.first)
            dk[:, low:high] += torch.bmm(ds.transpose(1, 2), x)
        dk, dv = (x.view(batch, groups, k.shape[1], -1).transpose(1, 2) for x in (dk.mul_(scale), dv))
        return dq.mul_(scale), dk, dv


def _by_head(x: Tensor) -> Tensor:
    """(B, m, K, d) → (B · K, m, d), contiguous."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[-1]).contiguous()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, rows, H, d) → (B · K, G · rows, d), contiguous."""
    return x.transpose(1, 2).reshape(x.shape[0] * groups, -1, x.shape[-1]).contiguous()


def _ungrouped(y: Tensor, batch: int, rows: int) -> Tensor:
    """(B · K, G · rows, d) → (B, rows, H, d)."""
    return y.view(batch, -1, rows, y.shape[-1]).transpose(1, 2)


def _scores(q: Tensor, keys: Tensor, mask: Mask, block: QueryBlock, scale: float) -> Tensor:
    """Masked scaled scores (B · K, G · rows, keys) of a block's queries q (B · K, G · rows, d)."""
    scores = torch.bmm(q.to(keys.dtype).mul(scale), keys.transpose(1, 2))
    if block.start < block.high:
        hidden = mask.hidden(block.first, block.last, block.start, block.high)
        part = scores.view(hidden.shape[0], -1, hidden.shape[1], keys.shape[1])[..., block.start - block.low :]
        part.masked_fill_(hidden[:, None], float("-inf"))
    return scores
