"""An optimizer inside DeepSpeed's engine, which decides where masters and states lie and calls for the updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...parallel.replicas.deepspeed import DeepSpeedReplicas
from ...parallel.replicas.protocol import OptimizerShard, SharedBucket
from .optimizer import Rule, UpdatePiece, UpdateScalars
from .plain import PlainStates


class DeepSpeedStates(PlainStates):
    """An `Optimizer` whose states lie beside DeepSpeed's flat masters; a unit's are views of these.

    Args:
        rules: what it computes, by the type of device where masters lie.
        replicas: of the engine.
    """

    def __init__(self, rules: dict[str, Rule], replicas: DeepSpeedReplicas) -> None:
        super().__init__()
        self._rules, self._replicas = rules, replicas
        self._flat = replicas.flats()
        self._of_flat: dict[int, dict[str, Tensor]] = {}
        self._now: UpdateScalars | None = None
        replicas.hook.update = self._update

    def prepare(self, unit: OptimizerShard, bucket: SharedBucket | None) -> None:
        flat, at = self._flat[unit.key]
        rule = self._rules[flat.device.type]
        states = self._of_flat.setdefault(id(flat), {})
        for name in rule.names:
            if name not in states:
                states[name] = torch.zeros_like(flat, dtype=rule.dtype or flat.dtype, requires_grad=False)
        self.states[unit.key] = {name: state[at:][: unit.value.numel()] for name, state in states.items()}

    def step(self, units: Sequence[OptimizerShard], now: UpdateScalars, *, alone: bool = False) -> None:
        self._now = now
        self._replicas.step()
        self._now = None

    def _update(self, flat: Tensor, decay: bool) -> None:
        assert self._now is not None and flat.grad is not None
        now = self._now.on_host() if flat.device.type == "cpu" else self._now
        piece = UpdatePiece(flat.detach(), flat.grad.detach(), self._of_flat[id(flat)], decay)
        self._rules[flat.device.type].update([piece], now)

    def settle(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
