"""The axes over which one family of parameters is summed, and over which it is spread.

The replicas of a parameter stand in one line of ranks. States are spread over groups of neighbours in it, and the ranks
at one place of all groups have the same share. Eight replicas, states over four:

    data      0 1 2 3 4 5 6 7
    states    0 1 2 3│4 5 6 7      reduce-scatter of gradients, all-gather of parameters
    copies    0       4            all-reduce of the share (and 1 5, 2 6, 3 7)

and gradients over two of these, which are then summed before the states' ranks are, microbatch by microbatch:

    grads     0 1│2 3│4 5│6 7      reduce-scatter of each microbatch's gradients
    between   0   2│               reduce-scatter of their sum (and 1 3, 4 6, 5 7), in place of that over states

Parameters over two of these are gathered among 0 1, 2 3, …, and who holds the same part of them (0 2, …) hands each
other the updated shares of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
        params: of those over which parameters of layers are spread; of size 1 where each has all.
        holders: of those of the states' axis with the same part of the parameters.
        grads: of those over which gradients are spread; of size 1 where each has all of its own.
        between: of those of the states' axis with the same part of the gradients.
        states: of those over which states are spread; of size 1 where each has all.
        copies: of those with the same share; of size 1 where there is only one.
    """

    data: Axis
    params: Axis
    holders: Axis
    grads: Axis
    between: Axis
    states: Axis
    copies: Axis

    @property
    def whole(self) -> SpreadAxes:
        """The same for parameters that are not spread."""
        return replace(self, params=Axis.single(""), holders=self.states)

    @property
    def share(self) -> int:
        """The number of this rank's share of the states: those of one part of the parameters follow each other."""
        return self.states.rank % self.params.size * self.holders.size + self.states.rank // self.params.size


def spread_axes(mesh: Mesh, family: ReplicaFamily, spread: SpreadDegrees) -> SpreadAxes:
    """The axes of a mesh that was made with the `spread_lines` of the same degrees."""
    name, data, single = _DATA[family], mesh.axis(_DATA[family]), Axis.single("")
    if spread.states == 1:
        return SpreadAxes(data, single, single, single, single, single, data)
    whole = spread.copies == 1
    states, copies = (data, single) if whole else (mesh.axis(f"{name}_states"), mesh.axis(f"{name}_copies"))
    if spread.grads == 1:
        return SpreadAxes(data, single, states, single, states, states, copies)
    alike = spread.grads == spread.states
    grads, between = (states, single) if alike else (mesh.axis(f"{name}_grads"), mesh.axis(f"{name}_between"))
    if spread.params == 1:
        return SpreadAxes(data, single, states, grads, between, states, copies)
    if spread.params == spread.grads:
        return SpreadAxes(data, grads, between, grads, between, states, copies)
    params, holders = mesh.axis(f"{name}_params"), mesh.axis(f"{name}_holders")
    return SpreadAxes(data, params, holders, grads, between, states, copies)


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
        if 1 < spread.params < spread.grads:
            grid = ranks.reshape(degrees.pp, spread.copies, -1, spread.params, inner)
            found[f"{name}_params"] = _rows(np.moveaxis(grid, 3, -1))
            found[f"{name}_holders"] = _rows(np.moveaxis(grid, 2, -1))
    return found


def _rows(grid: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in grid.reshape(-1, grid.shape[-1])]
