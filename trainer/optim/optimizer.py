"""Optimizers over flat units.

The gradient's factor (clipping) and the decision to skip a step stay on the device: both are tensors that the fused
kernels read, so that no step waits for the host.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...configs.errors import UserError
from ...configs.schema import AdamWConfig, OptimConfig, SgdConfig
from ...parallel.replicas.protocol import OptimizerShard
from .adamw_kernels import AdamKernel, AdamUpdate, adamw_kernel, without_bad


class Optimizer(Protocol):
    """Updates units; keeps its states by unit key."""

    states: dict[str, dict[str, Tensor]]
    """Unit key → state name → tensor of the unit's shape."""

    def prepare(self, unit: OptimizerShard) -> None:
        """Makes the unit's states, zero, where there are none yet."""
        ...

    def step(self, units: list[OptimizerShard], *, lr: float, factor: Tensor, skip: Tensor, count: Tensor) -> None:
        """value ← update(value, grad · factor), or nothing where `skip` is 1.

        Args:
            units: what to update.
            lr: learning rate.
            factor: multiplier of the gradients (a scalar on the device).
            skip: 0. or 1. (a scalar on the device).
            count: number of updates so far, this one included if it is not skipped (a scalar on the device).
        """
        ...


def make_optimizer(cfg: OptimConfig, device: torch.device) -> Optimizer:
    """The optimizer that the config names.

    Raises:
        UserError: optim.impl asks for something that is not installed.
    """
    match cfg:
        case AdamWConfig():
            return AdamW(cfg, adamw_kernel(cfg, device))
        case SgdConfig():
            return Sgd(cfg)
        case _:
            raise UserError(f"optim.name={cfg.name} has no optimizer")


class Sgd:
    """Stochastic gradient descent with optional momentum and decoupled weight decay."""

    def __init__(self, cfg: SgdConfig) -> None:
        self._cfg = cfg
        self.states: dict[str, dict[str, Tensor]] = {}

    def prepare(self, unit: OptimizerShard) -> None:
        if self._cfg.momentum:
            self.states.setdefault(unit.key, {"momentum": torch.zeros_like(unit.value)})

    def step(self, units: list[OptimizerShard], *, lr: float, factor: Tensor, skip: Tensor, count: Tensor) -> None:
        keep = (1 - skip).to(factor.dtype)
        for unit in units:
            update = without_bad(unit.grad, skip) * factor
            if self._cfg.momentum:
                state = self.states[unit.key]["momentum"]
                # A skipped step leaves the momentum alone.
                state.mul_(1 - keep * (1 - self._cfg.momentum)).add_(update)
                update = state
            if unit.decay and self._cfg.weight_decay:
                unit.value.mul_(1 - keep * (lr * self._cfg.weight_decay))
            unit.value.addcmul_(update, keep.expand_as(update), value=-lr)


class AdamW:
    """AdamW with bias correction; moments in the precision of the unit's value."""

    def __init__(self, cfg: AdamWConfig, kernel: AdamKernel) -> None:
        self._cfg, self._kernel = cfg, kernel
        self.states: dict[str, dict[str, Tensor]] = {}

    def prepare(self, unit: OptimizerShard) -> None:
        if unit.key not in self.states:
            self.states[unit.key] = {name: torch.zeros_like(unit.value) for name in ("exp_avg", "exp_avg_sq")}

    def step(self, units: list[OptimizerShard], *, lr: float, factor: Tensor, skip: Tensor, count: Tensor) -> None:
        for decay in (True, False):
            group = [u for u in units if u.decay == decay]
            if group:
                update = AdamUpdate(
                    [u.value for u in group],
                    [u.grad for u in group],
                    [self.states[u.key]["exp_avg"] for u in group],
                    [self.states[u.key]["exp_avg_sq"] for u in group],
                    count,
                    lr,
                    self._cfg.weight_decay if decay else 0.0,
                    factor,
                    skip,
                )
                self._kernel(update)


_ROW = 1024


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum of squares of all elements, a scalar of the gradient's own precision.

    By rows: torch on CPU adds one long vector up in a few running sums, and in fp32 loses 7e-4 of ten million squares.
    """
    flat = gradient.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    squares = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).square().sum()
    return squares + torch.linalg.vector_norm(flat[whole:]).square()
