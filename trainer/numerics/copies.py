"""Compares the parameters that several ranks hold copies of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallel.checksum import checksum
from ...parallel.comm.collectives import all_gather
from ...parallel.comm.mesh import Axis
from ...parallel.replicas.protocol import Replicas, SharedCopies
from .findings import DifferentCopies


@dataclass(frozen=True)
class _Unit:
    """Parameters of which the same ranks hold copies in one piece of memory.

    Args:
        holders: the ranks.
        names: of the parameters.
        sums: (parameters,) checksums of this rank's copies.
        differs: () whether not all copies are equal.
    """

    holders: tuple[int, ...]
    names: tuple[str, ...]
    sums: Tensor
    differs: Tensor


class CopyComparison:
    """The comparison of one rank's copies with the other holders', by one checksum, 8 bytes, for each unit.

    A unit's checksum is the sum of its parameters' ones, which stay here until somebody asks which parameter it was.

    Args:
        replicas: of the model; all ranks make their comparisons together.
        rank: this one.
        device: of the parameters.
    """

    def __init__(self, replicas: Replicas, rank: int, device: torch.device) -> None:
        self._replicas, self._device = replicas, device
        mine = torch.tensor([rank], dtype=torch.int64, device=device)
        self._holders = {
            key: tuple(_from_holders(mine, copies[0].axes).view(-1).tolist()) for key, copies in self._groups()
        }
        self._compared: list[list[_Unit]] = []
        """The units of the last two comparisons: the host may learn of the first of them only after the second."""

    def _groups(self) -> list[tuple[tuple[str, str], list[SharedCopies]]]:
        """The units by who holds them. All ranks of an axis have the same groups over it and take them in one order."""
        groups: dict[tuple[str, str], list[SharedCopies]] = {}
        for each in self._replicas.copies():
            groups.setdefault((each.axes[0].name, each.axes[1].name), []).append(each)
        return sorted(groups.items(), key=lambda item: item[0])

    def compare(self) -> Tensor:
        """The number, int64 (), of this rank's units of which not all copies are equal."""
        self._replicas.wait_gathers()
        units: list[_Unit] = []
        for key, group in self._groups():
            sums = [torch.stack([checksum(place.memory) for place in each.places]) for each in group]
            everyone = _from_holders(torch.stack([each.sum() for each in sums]), group[0].axes)
            differs = (everyone != everyone[0]).any(0)
            names = [tuple(place.name for place in each.places) for each in group]
            units += [_Unit(self._holders[key], *each) for each in zip(names, sums, differs, strict=True)]
        self._compared = [*self._compared[-1:], units]
        found = torch.zeros((), dtype=torch.int64, device=self._device)
        return found + sum(unit.differs for unit in units)

    def different(self) -> tuple[DifferentCopies, ...]:
        """The units that differed lately, with this rank's checksum of every parameter."""
        for units in self._compared:
            differing = [unit for unit in units if unit.differs]
            if differing:
                return tuple(DifferentCopies(unit.holders, unit.names, tuple(unit.sums.tolist())) for unit in differing)
        return ()


def _from_holders(mine: Tensor, axes: tuple[Axis, Axis]) -> Tensor:
    """(holders, n): what every rank of the first axis on every rank of the second has, n numbers each."""
    found = mine
    for axis in axes:
        if axis.size > 1:
            found = all_gather(found, axis).wait()
    return found.view(-1, len(mine))
