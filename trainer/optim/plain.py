"""States that are tensors of the shape of what they are of, beside it on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ...parallel.checksum import ParameterMemory
from ...parallel.global_tensor import GlobalTensor
from ...parallel.replicas.protocol import OptimizerShard, ShardSlice, SharedBucket
from .optimizer import Rule, UpdatePiece, UpdateScalars


def stored_slices(slices: Iterable[ShardSlice], kinds: Mapping[str, Mapping[str, Tensor]]) -> dict[str, GlobalTensor]:
    """KIND → unit key → tensor of the unit's shape, as KIND/NAME → this rank's piece of the global tensor."""
    pieces = list(slices)
    return {
        f"{kind}/{piece.name}": GlobalTensor(
            piece.sharding.placement, piece.start, piece.stop, units[piece.unit][piece.at :][: piece.stop - piece.start]
        )
        for kind, units in kinds.items()
        for piece in pieces
    }


def resting_masters(units: Mapping[str, OptimizerShard], slices: Iterable[ShardSlice]) -> list[ParameterMemory]:
    """Where this rank's masters lie; none, where the parameters themselves are updated."""
    return [
        ParameterMemory("master", piece.name, units[piece.unit].value[piece.at :][: piece.stop - piece.start])
        for piece in slices
        if units[piece.unit].rounded is not None
    ]


class PlainStates:
    """What such an `Optimizer` has in common with others."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, Tensor]] = {}

    def agree(self) -> None:
        """Nothing to do: no rank needs another one."""

    def stored(self, slices: Sequence[ShardSlice]) -> dict[str, GlobalTensor]:
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, states in self.states.items():
            for state, value in states.items():
                kinds.setdefault(f"optim/{state}", {})[key] = value
        return stored_slices(slices, kinds)

    def loaded(self, tensors: Mapping[str, GlobalTensor]) -> None:
        """Nothing to do: a checkpoint is read in place."""

    def resting(self, units: Mapping[str, OptimizerShard], slices: Sequence[ShardSlice]) -> list[ParameterMemory]:
        moments = [
            ParameterMemory(state, piece.name, value[piece.at :][: piece.stop - piece.start])
            for piece in slices
            for state, value in self.states.get(piece.unit, {}).items()
        ]
        return resting_masters(units, slices) + moments


class ResidentStates(PlainStates):
    """An `Optimizer` with states on the device.

    Args:
        rule: what it computes.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self._rule = rule

    def prepare(self, unit: OptimizerShard, bucket: SharedBucket | None) -> None:
        if self._rule.names and unit.key not in self.states:
            dtype = self._rule.dtype or unit.value.dtype
            self.states[unit.key] = {name: torch.zeros_like(unit.value, dtype=dtype) for name in self._rule.names}

    def step(self, units: Sequence[OptimizerShard], now: UpdateScalars, *, alone: bool = False) -> None:
        pieces = [UpdatePiece(unit.value, unit.grad, self.states.get(unit.key, {}), unit.decay) for unit in units]
        self._rule.update(pieces, now)
        for unit in units:
            if unit.rounded is not None:
                unit.rounded.copy_(unit.value)

    def settle(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
