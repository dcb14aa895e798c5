"""Attention by fused kernels, which know full and causal blocks, and slower, blocks with a mask.

What the queries see is cut up on the host. A run of successive tokens of one document sees the keys before it wholly
and its own causally: two blocks without a mask, wherever the keys lie (zigzag, gathered, packed). Windows, many short
documents and whatever else get masks, made on the device, for at most some hundred queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .blockwise import blocks
from .fused_kernels import Kernel
from .mask import Mask, TokenIndex
from .merge import merge
from .precision import precise
from .upload import upload

_MASKED_ROWS = 512
"""Queries per block with a mask."""

_SHORT = 128
"""Runs of fewer queries share a block with a mask rather than each start a kernel."""


@dataclass(frozen=True)
class Piece:
    """The queries [first, last) with the keys [low, high) of the sequences [sequence, end).

    Args:
        causal: they are the same tokens, and each sees those up to itself.
        masked: some queries do not see some keys; else all see all.
    """

    sequence: int
    end: int
    first: int
    last: int
    low: int
    high: int
    causal: bool = False
    masked: bool = False


def pieces(queries: TokenIndex, keys: TokenIndex, window: int | None, batch: int) -> list[Piece]:
    """Blocks that together have all that the queries see, in order of sequences and queries."""
    queries, keys = _on(queries, torch.device("cpu")), _on(keys, torch.device("cpu"))
    if window is not None and keys.count and int(queries.order.max()) - int(keys.order.min()) < window:
        window = None
    if queries.documents is None and len(queries.order) == len(keys.order) == 1:
        return list(_pieces(queries, keys, window, 0, batch))
    return [
        piece for i in range(batch) for piece in _pieces(_sequence(queries, i), _sequence(keys, i), window, i, i + 1)
    ]


def _pieces(queries: TokenIndex, keys: TokenIndex, window: int | None, sequence: int, end: int) -> Iterator[Piece]:
    """Of one sequence, or of several alike."""
    short = 0
    cuts = [queries.count] if window is not None else _ends_of_runs(queries)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        if window is not None or (stop - start < _SHORT and len(cuts) > 1):
            continue
        yield from _masked(queries, keys, window, sequence, end, short, start)
        yield from _run(queries, keys, sequence, end, start, stop)
        short = stop
    yield from _masked(queries, keys, window, sequence, end, short, queries.count)


def _run(queries: TokenIndex, keys: TokenIndex, sequence: int, end: int, first: int, last: int) -> Iterator[Piece]:
    """Successive tokens of one document."""
    mine = queries.part(first, last)
    (block,) = blocks(mine, keys, None, last - first)
    own = block.high - (last - first)
    theirs = keys.part(max(own, 0), block.high)
    if block.low == block.high:
        return
    if block.start == block.high:
        yield Piece(sequence, end, first, last, block.low, block.high)
    elif block.low <= own <= block.start and _same(mine, theirs):
        if block.low < own:
            yield Piece(sequence, end, first, last, block.low, own)
        yield Piece(sequence, end, first, last, own, block.high, causal=True)
    else:
        yield from _masked(queries, keys, None, sequence, end, first, last)


def _masked(
    queries: TokenIndex, keys: TokenIndex, window: int | None, sequence: int, end: int, first: int, last: int
) -> Iterator[Piece]:
    """The queries [first, last), whatever they see."""
    for block in blocks(queries.part(first, last), keys, window, _MASKED_ROWS):
        if block.low < block.high:
            rows = first + block.first, first + block.last
            yield Piece(sequence, end, *rows, block.low, block.high, masked=block.start < block.high)


def _ends_of_runs(rows: TokenIndex) -> list[int]:
    breaks = rows.order[0].diff() != 1
    if rows.documents is not None:
        breaks |= rows.documents[0].diff() != 0
    return [*(breaks.nonzero()[:, 0] + 1).tolist(), rows.count]


def _same(a: TokenIndex, b: TokenIndex) -> bool:
    if a.documents is not None and b.documents is not None and not torch.equal(a.documents, b.documents):
        return False
    return torch.equal(a.order, b.order)


def _sequence(rows: TokenIndex, index: int) -> TokenIndex:
    """One sequence of a batch."""
    order = rows.order[index : index + 1] if len(rows.order) > 1 else rows.order
    return TokenIndex(order, None if rows.documents is None else rows.documents[index : index + 1])


def _on(rows: TokenIndex, device: torch.device) -> TokenIndex:
    documents = None if rows.documents is None else upload(rows.documents, device)
    return TokenIndex(upload(rows.order, device), documents)


def _is_whole(found: list[Piece], q: Tensor, k: Tensor) -> bool:
    """Whether one block without a mask is all there is: q (B, n, H, d) to k (B, m, K, d)."""
    if len(found) != 1:
        return False
    piece = found[0]
    rows, keys, sequences = piece.last - piece.first, piece.high - piece.low, piece.end - piece.sequence
    return not piece.masked and (sequences, rows, keys) == (len(q), q.shape[1], k.shape[1])


def _device_mask(queries: TokenIndex, keys: TokenIndex, window: int | None, device: torch.device) -> Mask:
    return Mask(_on(queries, device), _on(keys, device), window)


class Fused:
    """A `LocalAttention` over fused kernels.

    Args:
        plain: for blocks without a mask.
        masked: for blocks with one.
    """

    def __init__(self, plain: Kernel, masked: Kernel) -> None:
        self.plain, self.masked = plain, masked

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """out (B, n, H, e) in q's type and lse (B, H, n)."""
        found = mask.once(pieces, mask.queries, mask.keys, mask.window, len(q))
        if len(found) == 1 and not found[0].masked and q.shape[1] == found[0].last - found[0].first:
            return self._forward(found[0], q, k, v, mask, scale)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        lse = q.new_full((len(q), q.shape[2], q.shape[1]), float("-inf"), dtype=precise(q.dtype))
        for _, together in groupby(found, lambda piece: (piece.sequence, piece.first)):
            first, *others = together
            batch, rows = slice(first.sequence, first.end), slice(first.first, first.last)
            y, part = self._forward(first, q, k, v, mask, scale)
            for piece in others:
                y, part = merge(y, part, *self._forward(piece, q, k, v, mask, scale))
            out[batch, rows], lse[batch, :, rows] = y.to(out.dtype), part
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv: of one block as its kernel makes them, of several in lse's precision."""
        found = mask.once(pieces, mask.queries, mask.keys, mask.window, len(q))
        if _is_whole(found, q, k):
            return self.plain.backward(dout, q, k, v, out, lse, found[0].causal, None, scale)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        for piece in found:
            batch = slice(piece.sequence, piece.end)
            rows, keys = (batch, slice(piece.first, piece.last)), (batch, slice(piece.low, piece.high))
            block = lse[batch, :, piece.first : piece.last]
            grads = self._kernel(piece).backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], block, piece.causal,
                self._hidden(piece, mask, q.device), scale,
            )  # fmt: skip
            for total, where, grad in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
                total[where] += grad
        return dq, dk, dv

    def _forward(
        self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse of a piece's queries from its keys."""
        batch, rows, keys = (
            slice(piece.sequence, piece.end),
            slice(piece.first, piece.last),
            slice(piece.low, piece.high),
        )
        hidden = self._hidden(piece, mask, q.device)
        kernel = self._kernel(piece)
        out, lse = kernel.forward(q[batch, rows], k[batch, keys], v[batch, keys], piece.causal, hidden, scale)
        if hidden is None:
            return out, lse
        # Kernels give such rows an lse of 0, or no number.
        empty = hidden.all(-1)
        return out.masked_fill(empty[..., None, None], 0), lse.masked_fill(empty[:, None], float("-inf"))

    def _kernel(self, piece: Piece) -> Kernel:
        return self.masked if piece.masked else self.plain

    def _hidden(self, piece: Piece, mask: Mask, device: torch.device) -> Tensor | None:
        if not piece.masked:
            return None
        there = mask.once(_device_mask, mask.queries, mask.keys, mask.window, device)
        hidden = there.hidden(piece.first, piece.last, piece.low, piece.high)
        return hidden if len(hidden) == 1 else hidden[piece.sequence : piece.end]
