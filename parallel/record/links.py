"""The delay matrix: between which two ranks data take long on their way (C4D's, arXiv 2406.04594). No torch.

A rank's row of a step says out of whose memory it copied longest, and how long. Over a window these are the cells of a
matrix, reader by owner: empty where links are as fast as they should be. One cell, or the two of a pair, is a link; a
line of them with the same rank in all is that rank's own way to the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from .parts import LINK_RANK, LINK_S

_SAME = 0.6
"""In which share of the steps the same link must be a rank's slowest."""
_SLOWER = 1.5
"""How much longer than its peers' slowest a link takes."""
_LEAST = 0.02
"""Of a step, that its copies must take."""

Link = tuple[int, int]
"""The rank that copies, and the one whose data it copies."""


def delay_matrix(rows: np.ndarray) -> dict[Link, float]:
    """The cells that are not empty: median seconds of a step.

    Args:
        rows: (steps, ranks, numbers) of a window.
    """
    found: dict[Link, float] = {}
    for rank in range(rows.shape[1]):
        owners, seconds = rows[:, rank, LINK_RANK].astype(int), rows[:, rank, LINK_S]
        owner, count = Counter(owners[seconds > 0].tolist()).most_common(1)[0] if (seconds > 0).any() else (-1, 0)
        if count >= _SAME * len(rows):
            found[rank, owner] = float(np.median(np.where(owners == owner, seconds, 0.0)))
    return found


def slow_links(matrix: Mapping[Link, float], roles: np.ndarray, step_s: float) -> list[Link]:
    """The cells that exceed those of ranks of the same role, and matter.

    Args:
        matrix: of a window.
        roles: (ranks,) the same number for ranks that do the same.
        step_s: the length of a step.
    """
    most = np.zeros(len(roles))
    for (rank, _), seconds in matrix.items():
        most[rank] = seconds
    found = []
    for link, seconds in matrix.items():
        peers = most[(roles == roles[link[0]]) & (np.arange(len(roles)) != link[0])]
        usual = float(np.median(peers)) if len(peers) else 0.0
        if seconds >= max(_SLOWER * usual, _LEAST * step_s):
            found.append(link)
    return found


def blamed_link(rank: int, slow: Iterable[Link]) -> tuple[int, int | None] | None:
    """What of a rank's links is to blame: the pair at the ends of one, or a rank all of whose links are slow (and
    None); None: none of its links is slow."""
    partners: dict[int, set[int]] = {}
    for reader, owner in slow:
        partners.setdefault(reader, set()).add(owner)
        partners.setdefault(owner, set()).add(reader)
    mine = partners.get(rank, set())
    if not mine:
        return None
    if len(mine) > 1:
        return rank, None
    (other,) = mine
    return (other, None) if len(partners[other]) > 1 else (rank, other)
