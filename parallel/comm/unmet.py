"""A rank's place in a mesh in which nobody meets: what it would hold can be worked out by any one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .axis import Axis
from .mesh import DENSE_AXES, EXPERT_AXES, Degrees, Mesh


class UnmetMesh(Mesh):
    """The axes of `Mesh` without communicators; nothing can be sent over them.

    Args:
        degrees: sizes of the axes.
        rank: the slot, 0 ≤ rank < degrees.world.
        vocab, ends, lines: as of `Mesh`.
    """

    def __init__(
        self,
        degrees: Degrees,
        rank: int,
        *,
        vocab: bool = False,
        ends: tuple[int, int] | None = None,
        lines: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
    ) -> None:
        self.degrees, self.rank, self.epoch, self.device = degrees, rank, 0, "cpu"
        world = degrees.world
        dense = np.arange(world).reshape(degrees.dense)
        found = _lines(dense, DENSE_AXES, rank)
        found |= {
            name: line for name, line in _lines(np.arange(world).reshape(degrees.expert), EXPERT_AXES, rank).items()
        }
        for name, each in (lines or {}).items():
            found[name] = np.array(next(line for line in each if rank in line))
        pp, dp, cp, *tp = (int(at) for at in np.argwhere(dense == rank)[0])
        found["tp"] = dense[pp, dp, cp].reshape(-1)
        found["data"] = dense[(pp, slice(None), slice(None), *tp)].reshape(-1)
        found["tokens"] = dense[pp, dp].reshape(-1)
        found["world"] = dense.reshape(-1)
        stages = dense.reshape(degrees.pp, -1)
        if vocab:
            # Pipeline-major: index on the axis = pipeline rank · tp + tensor rank.
            found["vocab_embed"] = found["vocab_head"] = dense[:, dp, cp].reshape(-1)
        if ends is not None and ends[0] != ends[1] and pp in ends:
            found["ends"] = stages[sorted(ends), list(stages[pp]).index(rank)]
        self._axes = {name: _axis(name, rank, line) for name, line in found.items()}


def _lines(grid: np.ndarray, names: tuple[str, ...], rank: int) -> dict[str, np.ndarray]:
    """The ranks that differ from one along one axis of a grid only, by the axis's name."""
    at = tuple(int(i) for i in np.argwhere(grid == rank)[0])
    return {name: grid[(*at[:dim], slice(None), *at[dim + 1 :])] for dim, name in enumerate(names)}


def _axis(name: str, rank: int, line: np.ndarray) -> Axis:
    ranks = tuple(int(each) for each in line)
    return Axis(name, ranks.index(rank), len(ranks), ranks)
