"""Which context rank takes which token of one sequence: equally many tokens each, and about as much causal attention.

The i-th token of a document sees i + 1 keys. `zigzag` lets all P ranks share every document: it is cut into 2P chunks,
of which rank r takes the r-th from the front and the r-th from the back; what is left of each by the division, fewer
than 2P tokens, is dealt out at the end, the ones with the most work first, back and forth over the ranks:

    P = 2    document 0 1 2 3 4 5 6 7 8     chunks of 2:  rank 0 │ 0 1 · 6 7     rank 1 │ 2 3 · 4 5     left: 8

`by_length` lets as few ranks share a document as its length needs (dynamic context parallelism): one that a single rank
holds whole costs no transfer. Longer ones are shared by groups of neighbours, of 2, 4, … or all P, zigzag among them:

    P = 4    │ A: all four │ B: ranks 0, 1 │ C: ranks 2, 3 │ D: rank 0 │ E: 1 │ F: 2 │ G: 3 │

Nothing is padded, and documents may have any length, also one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EVEN = 1.05
"""The most work of a rank, over the mean, with which `by_length` is content."""

_LIMITS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)


def zigzag(documents: np.ndarray, ranks: int) -> np.ndarray:
    """(S,) the rank of each token.

    Args:
        documents: (S,) ids, equal ones side by side; S a multiple of `ranks`.
        ranks: P.
    """
    cuts = _Cuts.of(documents)
    chunk = np.repeat(cuts.lengths // (2 * ranks), cuts.lengths)
    index = cuts.offsets // np.maximum(chunk, 1)
    owners = np.minimum(index, 2 * ranks - 1 - index)
    left = np.flatnonzero(cuts.offsets >= 2 * ranks * chunk)
    heaviest = left[np.argsort(-cuts.offsets[left], kind="stable")]
    back_and_forth = np.r_[np.arange(ranks), np.arange(ranks)[::-1]]
    owners[heaviest] = back_and_forth[np.arange(len(heaviest)) % (2 * ranks)]
    return owners


def by_length(documents: np.ndarray, ranks: int) -> np.ndarray:
    """As `zigzag`. The longest documents choose first, each the smallest group that is no more than its fair share of
    work, and of these the one with the least so far. What counts as fair is halved until the ranks are even; where they
    never are, the most even of all these ways and of zigzag is taken.
    """
    cuts = _Cuts.of(documents)
    share = (cuts.offsets + 1).sum() / ranks
    found = []
    for limit in _LIMITS:
        owners = _seated(cuts, ranks, share * limit)
        found.append((cuts.unevenness(owners, ranks), owners))
        if found[-1][0] <= EVEN:
            return owners
    even = zigzag(documents, ranks)
    found.append((cuts.unevenness(even, ranks), even))
    return min(found, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class _Cuts:
    """Where the documents of a sequence are.

    Args:
        starts: first token of each.
        lengths: in tokens.
        offsets: (S,) place of each token in its document.
    """

    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(documents: np.ndarray) -> _Cuts:
        starts = np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]])
        lengths = np.diff(np.r_[starts, len(documents)])
        return _Cuts(starts, lengths, np.arange(len(documents)) - np.repeat(starts, lengths))

    def unevenness(self, owners: np.ndarray, ranks: int) -> float:
        """Largest work of a rank over the mean."""
        work = np.bincount(owners, weights=self.offsets + 1.0, minlength=ranks)
        return float(work.max() / work.mean())


def _seated(cuts: _Cuts, ranks: int, fair: float) -> np.ndarray:
    """Owners where a document is shared by so many ranks that none has more than `fair` pairs of it."""
    owners = np.empty(len(cuts.offsets), dtype=np.int64)
    free, work = np.full(ranks, len(owners) // ranks), np.zeros(ranks)
    for document in np.argsort(-cuts.lengths, kind="stable"):
        start, length = cuts.starts[document], int(cuts.lengths[document])
        smallest = max(length * (length + 1) / 2 / fair, length * ranks / len(owners))
        seats = _seats(length, smallest, free, work)
        owners[start : start + length] = seats
        free -= np.bincount(seats, minlength=ranks)
        work += np.bincount(seats, weights=np.arange(1, length + 1), minlength=ranks)
    return owners


def _seats(length: int, smallest: float, free: np.ndarray, work: np.ndarray) -> np.ndarray:
    """(length,) owners of one document: the least busy group of at least `smallest` ranks that has room, or, where none
    has, runs on the ranks with the most room."""
    ranks = len(free)
    for size in range(1, ranks + 1):
        if ranks % size or (size < smallest and size < ranks):
            continue
        alone = np.zeros(length, dtype=np.int64)
        within = zigzag(alone, size) if size > 1 else alone
        groups = np.arange(ranks).reshape(-1, size)
        fitting = groups[(free[groups] >= np.bincount(within, minlength=size)).all(axis=1)]
        if len(fitting):
            return fitting[work[fitting].sum(axis=1).argmin()][within]
    roomiest = np.argsort(-free, kind="stable")
    return np.repeat(roomiest, free[roomiest])[:length]
