"""The axes over which one family of parameters is summed, and over which it is spread.

The replicas of a parameter stand in one line of ranks. States are spread over groups of neighbours in it, and the ranks
at one place of all groups have the same share. Eight replicas, states over four:

    data      0 1 2 3 4 5 6 7
    states    0 1 2 3│4 5 6 7      reduce-scatter of gradients, all-gather of parameters
    copies    0       4            all-reduce of the share (and 1 5, 2 6, 3 7)

and gradients over two of these, which are then summed before the states' ranks are, microbatch by microbatch:

    grads     0 1│2 3│4 5│6 7      reduce-scatter of each microbatch's gradients
    between   0   2│               reduce-scatter of their sum (and 1 3, 4 6, 5 7), in place of that over states
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
        grads: of those over which gradients are spread; of size 1 where each has all of its own.
        between: of those of the states' axis with the same part of the gradients.
        states: of those over which states are spread; of size 1 where each has all.
        copies: of those with the same share; of size 1 where there is only one.
    """

    data: Axis
    grads: Axis
    between: Axis
    states: Axis
    copies: Axis


def spread_axes(mesh: Mesh, family: ReplicaFamily, spread: SpreadDegrees) -> SpreadAxes:
    """The axes of a mesh that was made with the `spread_lines` of the same degrees."""
    name, data, single = _DATA[family], mesh.axis(_DATA[family]), Axis.single("")
    if spread.states == 1:
        return SpreadAxes(data, single, single, single, data)
    whole = spread.copies == 1
    states, copies = (data, single) if whole else (mesh.axis(f"{name}_states"), mesh.axis(f"{name}_copies"))
    if spread.grads in (1, spread.states):
        return SpreadAxes(data, single if spread.grads == 1 else states, single, states, copies)
    return SpreadAxes(data, mesh.axis(f"{name}_grads"), mesh.axis(f"{name}_between"), states, copies)


def spread_lines(degrees: Degrees, spreads: Mapping[ReplicaFamily, SpreadDegrees]) -> dict[str, list[tuple[int, ...]]]:
    """The lines of ranks of all axes that a mesh needs beside those that it always has, by name, in one order."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for family, spread in spreads.items():
        inner = degrees.tp if family == "dense" else degrees.ep * degrees.etp
        ranks, name = np.arange(degrees.world), _DATA[family]
        if 1 < spread.states < spread.replicas:
            grid = ranks.reshape(degrees.pp, spread.copies, spread.states, inner)
            found[f"{name}_states"] = _rows(np.moveaxis(grid, 2, -1))
            found[f"{name}_copies"] = _rows(np.moveaxis(grid, 1, -1))
        if 1 < spread.grads < spread.states:
            grid = ranks.reshape(degrees.pp, spread.copies, -1, spread.grads, inner)
            found[f"{name}_grads"] = _rows(np.moveaxis(grid, 3, -1))
            found[f"{name}_between"] = _rows(np.moveaxis(grid, 2, -1))
    return found


def _rows(grid: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in grid.reshape(-1, grid.shape[-1])]
