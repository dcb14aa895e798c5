"""Addresses for buffers whose lifetimes are known beforehand, so that those that never live together share bytes.

In one piece each, that is offline dynamic storage allocation: hard, and with a few sizes often 20 % above the most
bytes that live at once, which nothing can be below (MEMO, Zhao et al., 2024, solves an integer program for it). Where a
buffer may lie in several runs of pages no more than those bytes are needed, whatever the lifetimes: pages are dealt out
in the order of time, and as many are free as do not live. Each buffer takes the tightest run that has room for all of
it, and else as few runs as it can, so nearly all lie in one piece anyway. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_FINE = 128
"""Pages of the smallest buffer: what rounding to pages adds is at most one in so many."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes that are needed for a while.

    Args:
        start, end: from when, and until when (exclusive), in any order of instants.
        nbytes: how many.
    """

    start: int
    end: int
    nbytes: int


Runs = tuple[tuple[int, int], ...]
"""(first byte, bytes) of each piece of memory that a buffer fills one after the other."""


@dataclass(frozen=True)
class Packing:
    """Where each buffer lies.

    Args:
        runs: of each, in the order in which they were given; together at least as large.
        nbytes: of the memory that holds them all.
    """

    runs: tuple[Runs, ...]
    nbytes: int


def live_bytes(buffers: Sequence[Buffer]) -> int:
    """The most bytes that are needed at once."""
    held = most = 0
    for _, change, _ in _changes([b.nbytes for b in buffers], buffers):
        held += change
        most = max(most, held)
    return most


def pack(buffers: Sequence[Buffer], *, align: int = 64) -> Packing:
    """Runs of pages for each buffer.

    Args:
        buffers: in any order.
        align: every run begins at a multiple of it.
    """
    page = max(1, min((b.nbytes for b in buffers if b.nbytes), default=0) // _FINE)
    page = -(-page // align) * align
    pages = [-(-b.nbytes // page) for b in buffers]
    free = _Free(live_bytes([Buffer(b.start, b.end, count) for b, count in zip(buffers, pages, strict=True)]))
    total = free.pages
    found: list[Runs] = [()] * len(buffers)
    for _, change, k in _changes(pages, buffers):
        if change > 0:
            found[k] = free.take(change)
        else:
            free.give(found[k])
    runs = tuple(tuple((at * page, count * page) for at, count in mine) for mine in found)
    return Packing(runs, total * page)


def _changes(sizes: Sequence[int], buffers: Sequence[Buffer]) -> list[tuple[int, int, int]]:
    """(instant, what comes or goes, of which buffer) in the order of time; what ends at an instant goes first."""
    both = [((b.start, size, k), (b.end, -size, k)) for k, (b, size) in enumerate(zip(buffers, sizes, strict=True))]
    return sorted((each for pair in both for each in pair), key=lambda each: (each[0], each[1] > 0, each[2]))


class _Free:
    """The free pages, as (first, count) of each run, by address."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._runs: list[tuple[int, int]] = [(0, pages)] if pages else []

    def take(self, count: int) -> Runs:
        """So many pages: of the tightest run with room for them, else of the largest ones."""
        whole = [run for run in self._runs if run[1] >= count]
        taken = []
        while count:
            run = min(whole, key=lambda run: run[1]) if whole else max(self._runs, key=lambda run: run[1])
            at, length = run[0], min(run[1], count)
            self._runs.remove(run)
            if length < run[1]:
                self._runs.append((at + length, run[1] - length))
            taken.append((at, length))
            count -= length
        self._runs.sort()
        return tuple(taken)

    def give(self, runs: Runs) -> None:
        """Pages that are free again."""
        merged: list[tuple[int, int]] = []
        for at, count in sorted([*self._runs, *runs]):
            if merged and sum(merged[-1]) == at:
                merged[-1] = merged[-1][0], merged[-1][1] + count
            else:
                merged.append((at, count))
        self._runs = merged
