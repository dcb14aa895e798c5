"""The axes over which one family of parameters is summed, and over which it is spread.

The replicas of a parameter stand in one line of ranks. States are spread over groups of neighbours in it, and the ranks
at one place of all groups have the same share. Eight replicas, states over four:

    data      0 1 2 3 4 5 6 7
    states    0 1 2 3│4 5 6 7      reduce-scatter of gradients, all-gather of parameters
    copies    0       4            all-reduce of the share (and 1 5, 2 6, 3 7)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...configs.reading.spread import SpreadDegrees
from ..comm.axis import Axis
from ..comm.mesh import Degrees, Mesh
from ..sharding_rules import ReplicaFamily

_DATA: Mapping[ReplicaFamily, str] = {"dense": "data", "expert": "edp"}


@dataclass(frozen=True)
class SpreadAxes:
    """The axes of one family on this rank.

    Args:
        data: of all replicas.
        states: of those over which states are spread; of size 1 where each has all.
        copies: of those with the same share; of size 1 where there is only one.
    """

    data: Axis
    states: Axis
    copies: Axis


def spread_axes(mesh: Mesh, family: ReplicaFamily, spread: SpreadDegrees) -> SpreadAxes:
    """The axes of a mesh that was made with the `spread_lines` of the same degrees."""
    data = mesh.axis(_DATA[family])
    if spread.states == 1:
        return SpreadAxes(data, Axis.single(""), data)
    if spread.copies == 1:
        return SpreadAxes(data, data, Axis.single(""))
    return SpreadAxes(data, *(mesh.axis(f"{_DATA[family]}_{part}") for part in ("states", "copies")))


def spread_lines(degrees: Degrees, spreads: Mapping[ReplicaFamily, SpreadDegrees]) -> dict[str, list[tuple[int, ...]]]:
    """The lines of ranks of all axes that a mesh needs beside those that it always has, by name, in one order."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for family, spread in spreads.items():
        if spread.states == 1 or spread.copies == 1:
            continue
        inner = degrees.tp if family == "dense" else degrees.ep * degrees.etp
        grid = np.arange(degrees.world).reshape(degrees.pp, spread.copies, spread.states, inner)
        name = _DATA[family]
        found[f"{name}_states"] = _rows(np.moveaxis(grid, 2, -1))
        found[f"{name}_copies"] = _rows(np.moveaxis(grid, 1, -1))
    return found


def _rows(grid: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in grid.reshape(-1, grid.shape[-1])]
