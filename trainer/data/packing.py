"""Documents end to end as one stream of tokens, and windows of it as training samples.

Window w of a stream is the tokens [w T, w T + T]: T inputs and, one later, T labels. Windows share no input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...configs.errors import UserError
from .indexed import SCAN_BYTES, IndexedReader

_SCAN_CHUNK = 8 << 20


@dataclass(frozen=True)
class Boundaries:
    """Where documents start inside windows: `window` [n] numbers the row, `offset` [n] in 1..T the token within
    it, sorted by row and offset, without repeats. Offset T is a label only."""

    window: np.ndarray
    offset: np.ndarray


class TokenStream:
    """The tokens of one or more .bin files end to end, with random access.

    A document starts where an index says, or, when `eod` is given, after every such token and nowhere else.
    """

    def __init__(self, parts: Sequence[IndexedReader], eod: int | None = None) -> None:
        floats = [
            f"{part.prefix}.bin holds {part.dtype.name}, not token ids" for part in parts if part.dtype.kind == "f"
        ]
        if floats:
            raise UserError(*floats)
        self.parts, self.eod = tuple(parts), eod
        self._offsets = np.cumsum([0] + [part.size for part in parts])
        self.tokens = int(self._offsets[-1])
        self.documents = sum(part.documents for part in parts)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` [n] with the tokens [start, start + n)."""
        stop = start + len(out)
        part = int(np.searchsorted(self._offsets, start, "right")) - 1
        while start < stop:
            first = int(self._offsets[part])
            chunk = self.parts[part].read(start - first, stop - start)
            out[len(out) - (stop - start) :][: len(chunk)] = chunk
            start += len(chunk)
            part += 1

    def windows(self, starts: np.ndarray, seq_len: int) -> np.ndarray:
        """Tokens [b, seq_len + 1], int64, from each of `starts` [b]."""
        out = np.empty((len(starts), seq_len + 1), np.int64)
        for row, start in zip(out, starts.tolist(), strict=True):
            self.read(start, row)
        return out

    def boundaries(self, starts: np.ndarray, seq_len: int) -> Boundaries:
        """Document starts within the windows at token `starts` [b]; reads no tokens unless `eod` is given."""
        if self.eod is not None:
            tokens = self.windows(starts, seq_len)[:, :-1]
            window, at = np.nonzero(tokens == self.eod)
            return Boundaries(window, at + 1)
        parts = zip(self.parts, self._offsets[:-1], strict=True)
        found = [_document_starts(part, starts - first, seq_len) for part, first in parts]
        window, offset = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        # Empty documents, and a file's end that is the next one's start, repeat an offset.
        unique = np.unique(window * (seq_len + 1) + offset)
        return Boundaries(*np.divmod(unique, seq_len + 1))

    def id_range(self) -> tuple[int, int, str]:
        """Smallest and largest token id found, and the file of the largest. Files over 2 GiB are sampled evenly.

        Files with checksums (`IndexedReader.verify`) are not searched: what was written with them says it.
        """
        low, high, where = 0, -1, ""
        for part in self.parts:
            if part.meta is not None:
                if part.meta.largest > high:
                    high, where = part.meta.largest, f"{part.prefix}.bin"
                continue
            step = max(1, _SCAN_CHUNK // part.dtype.itemsize)
            chunks = range(0, part.size, step)
            every = max(1, -(-part.size * part.dtype.itemsize // SCAN_BYTES))
            for start in chunks[::every]:
                chunk = part.read(start, step)
                low = min(low, int(chunk.min()))
                if int(chunk.max()) > high:
                    high, where = int(chunk.max()), f"{part.prefix}.bin"
        return low, high, where


def _document_starts(part: IndexedReader, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and offsets, for one file, of document starts in (start, start + seq_len] of each of `starts` [b]."""
    near = np.flatnonzero((starts + seq_len >= 0) & (starts < part.size))
    first = _count_up_to(part, starts[near])
    counts = _count_up_to(part, starts[near] + seq_len) - first
    rows = np.repeat(near, counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    documents = np.repeat(first, counts) + within
    return rows, part.document_starts(documents) - starts[rows]


def _count_up_to(part: IndexedReader, token: np.ndarray) -> np.ndarray:
    """Number [n] of documents that start at or before `token` [n].

    A bisection of the memory-mapped index for all tokens at once: np.searchsorted would first copy the index, whose
    8-byte entries lie unaligned in the file, on every call.
    """
    low, high = np.zeros(len(token), np.int64), np.full(len(token), part.documents)
    while (low < high).any():
        middle = (low + high) // 2
        before = part.document_starts(np.minimum(middle, part.documents - 1)) <= token
        open_ = low < high
        low, high = np.where(open_ & before, middle + 1, low), np.where(open_ & ~before, middle, high)
    return low


def pair_sum(found: Boundaries, windows: int, seq_len: int, reach: int) -> int:
    """Twice the unmasked attention pairs over the documents of `windows` windows, labels not counted.

    A document of L tokens has L^2, or 2 r L - r^2 where a token sees r = `reach` < L tokens at most.
    """
    rows = np.arange(windows)
    window = np.concatenate((rows, found.window, rows))
    offset = np.concatenate((np.zeros(windows, np.int64), found.offset, np.full(windows, seq_len)))
    cuts = np.sort(window * (seq_len + 1) + offset)
    lengths = np.diff(cuts)
    # Between the end of one window and the start of the next lies one cell that belongs to neither.
    lengths = lengths[cuts[:-1] % (seq_len + 1) != seq_len]
    seen = np.minimum(lengths, reach)
    return int((2 * seen * lengths - seen**2).sum())
