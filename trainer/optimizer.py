"""Optimizers over flat units.

The gradient's factor (clipping) and the decision to skip a step stay on the device: both are tensors that the fused
kernels read, so that no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..configs.errors import UserError
from ..configs.schema import AdamWConfig, OptimConfig, SgdConfig
from ..parallel.data import Unit


class Optimizer(Protocol):
    """Updates units; keeps its states by unit key."""

    states: dict[str, dict[str, Tensor]]
    """Unit key → state name → tensor of the unit's shape."""

    def prepare(self, unit: Unit) -> None:
        """Makes the unit's states, zero, where there are none yet."""
        ...

    def step(self, units: list[Unit], *, lr: float, factor: Tensor, skip: Tensor, count: Tensor) -> None:
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
            return AdamW(cfg, _adamw_kernel(cfg, device))
        case SgdConfig():
            return Sgd(cfg)
        case _:
            raise UserError(f"optim.name={cfg.name} has no optimizer")


class Sgd:
    """Stochastic gradient descent with optional momentum and decoupled weight decay."""

    def __init__(self, cfg: SgdConfig) -> None:
        self._cfg = cfg
        self.states: dict[str, dict[str, Tensor]] = {}

    def prepare(self, unit: Unit) -> None:
        if self._cfg.momentum:
            self.states.setdefault(unit.key, {"momentum": torch.zeros_like(unit.value)})

    def step(self, units: list[Unit], *, lr: float, factor: Tensor, skip: Tensor, count: Tensor) -> None:
        keep = (1 - skip).to(factor.dtype)
        for unit in units:
            update = _clean(unit.grad, skip) * factor
            if self._cfg.momentum:
                state = self.states[unit.key]["momentum"]
                # A skipped step leaves the momentum alone.
                state.mul_(1 - keep * (1 - self._cfg.momentum)).add_(update)
                update = state
            if unit.decay and self._cfg.weight_decay:
                unit.value.mul_(1 - keep * (lr * self._cfg.weight_decay))
            unit.value.addcmul_(update, keep.expand_as(update), value=-lr)


def _clean(grad: Tensor, skip: Tensor) -> Tensor:
    """The gradient, or zeros where the step is skipped (0 · NaN would be NaN)."""
    return torch.where(skip.bool(), torch.zeros_like(grad), grad)


Kernel = Callable[..., None]


class AdamW:
    """AdamW with bias correction; moments in the precision of the unit's value."""

    def __init__(self, cfg: AdamWConfig, kernel: Kernel) -> None:
        self._cfg, self._kernel = cfg, kernel
        self.states: dict[str, dict[str, Tensor]] = {}

    def prepare(self, unit: Unit) -> None:
        if unit.key not in self.states:
            self.states[unit.key] = {name: torch.zeros_like(unit.value) for name in ("exp_avg", "exp_avg_sq")}

    def step(self, units: list[Unit], *, lr: float, factor: Tensor, skip: Tensor, count: Tensor) -> None:
        for decay in (True, False):
            group = [u for u in units if u.decay == decay]
            if group:
                self._kernel(
                    [u.value for u in group],
                    [u.grad for u in group],
                    [self.states[u.key]["exp_avg"] for u in group],
                    [self.states[u.key]["exp_avg_sq"] for u in group],
                    count=count,
                    lr=lr,
                    weight_decay=self._cfg.weight_decay if decay else 0.0,
                    factor=factor,
                    skip=skip,
                )


def _adamw_kernel(cfg: AdamWConfig, device: torch.device) -> Kernel:
    match cfg.impl:
        case "apex":
            return _apex(cfg)
        case "auto" if device.type == "cuda" and _has_apex():
            return _apex(cfg)
        case "foreach":
            return _foreach(cfg)
        case _:
            return _fused(cfg)


def _fused(cfg: AdamWConfig) -> Kernel:
    def kernel(
        values: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        *,
        count: Tensor,
        lr: float,
        weight_decay: float,
        factor: Tensor,
        skip: Tensor,
    ) -> None:
        scale: Tensor | None = factor.reciprocal()  # the kernel divides by it
        if values[0].dtype == torch.float64:  # the kernel reads the scale in fp32 only
            scale = None
            torch._foreach_mul_(grads, factor)
        torch._fused_adamw_(
            values,
            grads,
            means,
            squares,
            [],
            [count] * len(values),
            lr=lr,
            beta1=cfg.beta1,
            beta2=cfg.beta2,
            weight_decay=weight_decay,
            eps=cfg.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=skip,
        )

    return kernel


def _foreach(cfg: AdamWConfig) -> Kernel:
    """The same arithmetic by torch's elementwise operators: the readable reference of the fused kernels."""

    def kernel(
        values: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        *,
        count: Tensor,
        lr: float,
        weight_decay: float,
        factor: Tensor,
        skip: Tensor,
    ) -> None:
        keep, count = (1 - skip).to(values[0].dtype), count.to(values[0].dtype)
        size = lr / (1 - cfg.beta1**count)
        root = (1 - cfg.beta2**count).sqrt()
        for value, grad, mean, square in zip(values, grads, means, squares, strict=True):
            g = _clean(grad, skip) * factor
            mean.lerp_(g, keep * (1 - cfg.beta1))
            square.lerp_(g * g, keep * (1 - cfg.beta2))
            value.mul_(1 - keep * (lr * weight_decay))
            value.sub_(keep * size * mean / (square.sqrt() / root + cfg.eps))

    return kernel


def _has_apex() -> bool:
    try:
        import amp_C  # noqa: F401  # pyright: ignore[reportMissingImports]  # apex's compiled part
        import apex.multi_tensor_apply  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _apex(cfg: AdamWConfig) -> Kernel:
    if not _has_apex():
        raise UserError("optim.impl=apex needs NVIDIA apex built with its CUDA extensions; set optim.impl=fused")
    import amp_C  # pyright: ignore[reportMissingImports]
    from apex.multi_tensor_apply import multi_tensor_applier  # pyright: ignore[reportMissingImports]

    def kernel(
        values: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        *,
        count: Tensor,
        lr: float,
        weight_decay: float,
        factor: Tensor,
        skip: Tensor,
    ) -> None:
        device = values[0].device
        multi_tensor_applier(
            amp_C.multi_tensor_adam_capturable,
            skip.int(),
            [grads, values, means, squares],
            torch.tensor(lr, device=device),
            cfg.beta1,
            cfg.beta2,
            cfg.eps,
            count.int(),
            1,  # decoupled weight decay
            1,  # bias correction
            weight_decay,
            factor.reciprocal() if factor.dim() else factor.reciprocal().reshape(1),
        )

    return kernel


_ROW = 1024


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum of squares of all elements, a scalar of the gradient's own precision.

    By rows: torch on CPU adds one long vector up in a few running sums, and in fp32 loses 7e-4 of ten million squares.
    """
    flat = gradient.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    squares = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).square().sum()
    return squares + torch.linalg.vector_norm(flat[whole:]).square()
