"""Where the states of an optimizer lie: beside what they are of, or in another place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...configs.schema import MemoryConfig, OptimConfig
from ...parallel.record.ring import Recorder
from ...parallel.replicas.protocol import OptimizerShard
from .offload import OffloadedStates
from .optimizer import Rule, UpdatePiece, UpdateScalars, make_rule
from .places import StatePlace


class Optimizer(Protocol):
    """Updates units; keeps their states by unit key."""

    states: dict[str, dict[str, Tensor]]
    """Unit key → state name → tensor of the unit's shape."""

    def prepare(self, unit: OptimizerShard) -> None:
        """Makes the unit's states, zero, where there are none yet."""
        ...

    def step(self, units: Sequence[OptimizerShard], now: UpdateScalars) -> None:
        """Updates the units, and what follows them in lower precision. Called again after an error with the same
        units, it does what it had not done."""
        ...

    def settle(self) -> None:
        """Returns when all states are whole in their place."""
        ...

    def close(self) -> None:
        """Ends what runs beside the step."""
        ...


def make_optimizer(
    cfg: OptimConfig,
    device: torch.device,
    place: StatePlace | None = None,
    memory: MemoryConfig | None = None,
    *,
    fixed: bool = False,
    recorder: Recorder | None = None,
) -> Optimizer:
    """The optimizer that the config names.

    Args:
        cfg: which.
        device: of what is updated.
        place: of its states, and of the masters; none: the device.
        memory: how it goes about a place; none: the defaults.
        fixed: the same updates are made on the same device in every run.
        recorder: of its waits.

    Raises:
        UserError: optim.impl asks for something that is not installed.
    """
    rule = make_rule(cfg, device)
    if place is None:
        return ResidentStates(rule)
    on_host = rule if device.type == "cpu" else make_rule(cfg, torch.device("cpu"))
    memory = memory or MemoryConfig()
    return OffloadedStates(rule, on_host, place, device, memory, fixed=fixed, recorder=recorder)


class ResidentStates:
    """States on the device, in the precision of the unit's value."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.states: dict[str, dict[str, Tensor]] = {}

    def prepare(self, unit: OptimizerShard) -> None:
        if self._rule.names and unit.key not in self.states:
            self.states[unit.key] = {name: torch.zeros_like(unit.value) for name in self._rule.names}

    def step(self, units: Sequence[OptimizerShard], now: UpdateScalars) -> None:
        pieces = [UpdatePiece(unit.value, unit.grad, self.states.get(unit.key, {}), unit.decay) for unit in units]
        self._rule.update(pieces, now)
        for unit in units:
            if unit.rounded is not None:
                unit.rounded.copy_(unit.value)

    def settle(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
