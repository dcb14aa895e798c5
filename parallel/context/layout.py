"""Dealing out the tokens of a microbatch over the context ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..kernels.mask import TokenIndex, TokenLayout
from . import owners

Deal = Callable[[int, int, int, Tensor | None], TokenLayout]
"""From the tokens of a sequence, the number of ranks, this rank, and (B, length) document ids or none."""


def deal_of(placement: str) -> Deal:
    """What `parallel.context.placement` names."""
    return {"contiguous": contiguous, "zigzag": zigzag, "by_length": by_length}[placement]


def contiguous(length: int, ranks: int, rank: int, documents: Tensor | None = None) -> TokenLayout:
    """Equal runs of the sequence, in rank order.

    Args:
        length: tokens of a sequence; a multiple of `ranks`.
        ranks: of the context axis.
        rank: this one.
        documents: (B, length) ids, or none.
    """
    return _layout(np.arange(length).reshape(1, ranks, -1), rank, documents)


def zigzag(length: int, ranks: int, rank: int, documents: Tensor | None = None) -> TokenLayout:
    """Every document of (B, length) shared by all ranks (`owners.zigzag`); arguments as of `contiguous`."""
    return _dealt(owners.zigzag, length, ranks, rank, documents)


def by_length(length: int, ranks: int, rank: int, documents: Tensor | None = None) -> TokenLayout:
    """Documents of (B, length) shared by as few ranks as need be (`owners.by_length`); arguments as of `contiguous`."""
    return _dealt(owners.by_length, length, ranks, rank, documents)


def _dealt(
    owners_of: Callable[[np.ndarray, int], np.ndarray], length: int, ranks: int, rank: int, documents: Tensor | None
) -> TokenLayout:
    ids = np.zeros((1, length), dtype=np.int64) if documents is None else documents.cpu().numpy()
    taken = np.stack([owners_of(row, ranks) for row in ids])
    # Stable: every rank's tokens stay in their order.
    return _layout(np.argsort(taken, axis=1, kind="stable").reshape(len(taken), ranks, -1), rank, documents)


def _layout(orders: np.ndarray, rank: int, documents: Tensor | None) -> TokenLayout:
    """From (B or 1, ranks, n) orders."""
    found = []
    for order in torch.from_numpy(orders).unbind(1):
        mine = None
        if documents is not None:
            mine = documents.gather(1, order.expand(len(documents), -1).to(documents.device))
        found.append(TokenIndex(order, mine))
    return TokenLayout(tuple(found), rank)
