"""What optimizers compute, element by element of flat pieces of the parameters.

The gradient's factor (clipping) and the decision to skip a step stay on the device: both are tensors that the fused
kernels read, so that no step waits for the host. Where moments lie and in which form is not known here (`states.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...configs.errors import UserError
from ...configs.schema import AdamWConfig, OptimConfig, SgdConfig
from .adamw_kernels import AdamKernel, AdamUpdate, adamw_kernel, without_bad


@dataclass(frozen=True)
class UpdateScalars:
    """What the updates of one step share.

    Args:
        lr: learning rate.
        factor: multiplier of the gradients (a scalar on the device).
        skip: 0. or 1. (a scalar on the device).
        count: number of updates so far, this one included if it is not skipped (a scalar on the device).
    """

    lr: float
    factor: Tensor
    skip: Tensor
    count: Tensor

    def on_host(self) -> UpdateScalars:
        """The same on the CPU, for which it waits."""
        if not self.factor.is_cuda:
            return self
        held = torch.stack([each.double() for each in (self.factor, self.skip, self.count)]).cpu()
        kept = (self.factor, self.skip, self.count)
        return UpdateScalars(self.lr, *(each.to(old.dtype) for each, old in zip(held, kept, strict=True)))


@dataclass(frozen=True)
class UpdatePiece:
    """A run of elements to update, all (n,) on one device.

    Args:
        value: what is updated.
        grad: its reduced gradient; the update may overwrite it.
        states: by name.
        decay: whether weight decay applies.
    """

    value: Tensor
    grad: Tensor
    states: Mapping[str, Tensor]
    decay: bool


class Rule(Protocol):
    """How an optimizer updates."""

    names: tuple[str, ...]
    """Of its states, each of the shape of what is updated."""
    dtype: torch.dtype | None
    """Of its states; none: that of what is updated."""

    def update(self, pieces: Sequence[UpdatePiece], now: UpdateScalars) -> None:
        """value ← update(value, grad · factor), states likewise; nothing where `skip` is 1."""
        ...


def make_rule(cfg: OptimConfig, device: torch.device) -> Rule:
    """The rule that the config names, for tensors on a device.

    Raises:
        UserError: optim.impl asks for something that is not installed.
    """
    match cfg:
        case AdamWConfig():
            rule = AdamW(cfg, adamw_kernel(cfg, device))
            return HalfStates(rule) if cfg.states == "bf16" else rule
        case SgdConfig():
            return Sgd(cfg)
        case _:
            raise UserError(f"optim.name={cfg.name} has no optimizer")


class HalfStates:
    """A rule whose states are kept in bf16, rounded to nearest after each update.

    Args:
        rule: which.
    """

    dtype: torch.dtype | None = torch.bfloat16

    def __init__(self, rule: Rule) -> None:
        self._rule, self.names = rule, rule.names

    def update(self, pieces: Sequence[UpdatePiece], now: UpdateScalars) -> None:
        for piece in pieces:
            full = {name: state.to(piece.value.dtype) for name, state in piece.states.items()}
            self._rule.update([replace(piece, states=full)], now)
            for name, state in piece.states.items():
                state.copy_(full[name])


class Sgd:
    """Stochastic gradient descent with optional momentum and decoupled weight decay."""

    dtype: torch.dtype | None = None

    def __init__(self, cfg: SgdConfig) -> None:
        self._cfg = cfg
        self.names: tuple[str, ...] = ("momentum",) if cfg.momentum else ()

    def update(self, pieces: Sequence[UpdatePiece], now: UpdateScalars) -> None:
        keep = (1 - now.skip).to(now.factor.dtype)
        for piece in pieces:
            update = without_bad(piece.grad, now.skip) * now.factor
            if self._cfg.momentum:
                state = piece.states["momentum"]
                # A skipped step leaves the momentum alone.
                state.mul_(1 - keep * (1 - self._cfg.momentum)).add_(update)
                update = state
            if piece.decay and self._cfg.weight_decay:
                piece.value.mul_(1 - keep * (now.lr * self._cfg.weight_decay))
            piece.value.addcmul_(update, keep.expand_as(update), value=-now.lr)


class AdamW:
    """AdamW with bias correction."""

    names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    dtype: torch.dtype | None = None

    def __init__(self, cfg: AdamWConfig, kernel: AdamKernel) -> None:
        self._cfg, self._kernel = cfg, kernel

    def update(self, pieces: Sequence[UpdatePiece], now: UpdateScalars) -> None:
        for decay in (True, False):
            group = [piece for piece in pieces if piece.decay == decay]
            if group:
                update = AdamUpdate(
                    [piece.value for piece in group],
                    [piece.grad for piece in group],
                    [piece.states["exp_avg"] for piece in group],
                    [piece.states["exp_avg_sq"] for piece in group],
                    now.count,
                    now.lr,
                    self._cfg.weight_decay if decay else 0.0,
                    now.factor,
                    now.skip,
                )
                self._kernel(update)
