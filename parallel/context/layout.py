"""Dealing out the tokens of a micro-batch over the context ranks: each has as many, and as much attention to do.

In causal attention the i-th token of a document sees i + 1 keys. A document is cut into 2P chunks, of which rank r
takes the r-th from the front and the r-th from the back (zigzag); what is left of each document by the division, fewer
than 2P tokens, is dealt out at the end, the ones with the most work first, back and forth over the ranks:

    P = 2    document 0 1 2 3 4 5 6 7 8     chunks of 2:  rank 0 │ 0 1 · 6 7     rank 1 │ 2 3 · 4 5     left: 8

So nothing is padded, and documents of any length, also of one token, keep the ranks even.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .rows import Rows, Spread


def contiguous(length: int, ranks: int, rank: int, documents: Tensor | None = None) -> Spread:
    """Equal runs of the sequence, in rank order.

    Args:
        length: tokens of a sequence; a multiple of `ranks`.
        rank: this one.
        documents: (B, length) ids, or none.
    """
    return _spread(np.arange(length).reshape(1, ranks, -1), rank, documents)


def zigzag(length: int, ranks: int, rank: int, documents: Tensor | None = None) -> Spread:
    """Even causal work, document by document; arguments as of `contiguous`."""
    if documents is None:
        owners = _owners(np.zeros(length, dtype=np.int64), ranks)[None]
    else:
        owners = np.stack([_owners(row, ranks) for row in documents.cpu().numpy()])
    # Stable: every rank's tokens stay in their order.
    orders = np.argsort(owners, axis=1, kind="stable").reshape(len(owners), ranks, -1)
    return _spread(orders, rank, documents)


def _owners(documents: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each token of one sequence; `documents` (S,) ids, equal ones side by side."""
    starts = np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]])
    lengths = np.diff(np.r_[starts, len(documents)])
    offsets = np.arange(len(documents)) - np.repeat(starts, lengths)
    chunk = np.repeat(lengths // (2 * ranks), lengths)
    index = offsets // np.maximum(chunk, 1)
    owners = np.minimum(index, 2 * ranks - 1 - index)
    left = np.flatnonzero(offsets >= 2 * ranks * chunk)
    heaviest = left[np.argsort(-offsets[left], kind="stable")]
    back_and_forth = np.r_[np.arange(ranks), np.arange(ranks)[::-1]]
    owners[heaviest] = back_and_forth[np.arange(len(heaviest)) % (2 * ranks)]
    return owners


def _spread(orders: np.ndarray, rank: int, documents: Tensor | None) -> Spread:
    """From (B or 1, ranks, n) orders."""
    found = []
    for order in torch.from_numpy(orders).unbind(1):
        mine = None
        if documents is not None:
            mine = documents.gather(1, order.expand(len(documents), -1).to(documents.device))
        found.append(Rows(order, mine))
    return Spread(tuple(found), rank)
