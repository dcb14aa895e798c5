"""The update of AdamW, done in several ways: by torch's fused kernel, by its elementwise operators, or by NVIDIA apex.

What decides about the step stays on the device: the factor of the gradients, the number of updates, whether to skip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.schema import AdamWConfig, OptimConfig
from ..devices.visible import has_apex

_WAY_OUT = "set optim.impl=fused"
_DECOUPLED_DECAY, _BIAS_CORRECTION = 1, 1
"""apex's modes."""


@dataclass(frozen=True)
class AdamUpdate:
    """One update of flat tensors and their moments, in place.

    Args:
        values, grads, means, squares: (n,) each; of the same tensors in the same order.
        count, lr, factor, skip: as of `Optimizer.step`.
        weight_decay: of these tensors.
    """

    values: list[Tensor]
    grads: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    count: Tensor
    lr: float
    weight_decay: float
    factor: Tensor
    skip: Tensor


AdamKernel = Callable[[AdamUpdate], None]
"""Does an update."""


def adamw_kernel(cfg: AdamWConfig, device: torch.device) -> AdamKernel:
    """The way that `optim.impl` names.

    Raises:
        UserError: apex is asked for and cannot be used, or does not compute what it should.
    """
    match cfg.impl:
        case "foreach":
            return _foreach(cfg)
        case "apex":
            if not has_apex():
                raise UserError(f"optim.impl=apex needs NVIDIA apex built with its CUDA extensions; {_WAY_OUT}")
            return _checked(_apex(cfg), cfg, device)
        case "auto" if device.type == "cuda" and has_apex():
            fast, exact = _checked(_apex(cfg), cfg, device), _fused(cfg)

            def by_type(update: AdamUpdate) -> None:
                (exact if update.values[0].dtype == torch.float64 else fast)(update)

            return by_type
        case _:
            return _fused(cfg)


def _checked(kernel: AdamKernel, cfg: AdamWConfig, device: torch.device) -> AdamKernel:
    """The kernel of another library, after a few updates of a few numbers, of which it skips some.

    Its arguments are nobody's promise: better before the first step than a run whose gradients are slightly wrong.

    Raises:
        UserError: it does not do what the readable reference does.
    """
    draws = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(64, generator=draws).to(device) for _ in range(2))
    factor, results = torch.full((), 0.25, device=device), []
    for way in (kernel, _foreach(cfg)):
        value, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        tensors, count = ([value], [mean], [square]), torch.zeros((), device=device)
        for skipped in (True, False, True, False):
            skip, given = torch.full((), float(skipped), device=device), torch.full_like(grad, float("nan"))
            count = count + (1 - skip)
            grads = [given if skipped else grad.clone()]
            way(AdamUpdate(tensors[0], grads, *tensors[1:], count, lr=0.01, weight_decay=0.1, factor=factor, skip=skip))
        results.append(torch.stack((value, mean, square)))
    if not torch.allclose(*results, rtol=1e-4, atol=1e-6):
        raise UserError(Problem("optim.impl", f"apex, as installed, does not compute AdamW as it should; {_WAY_OUT}"))
    return kernel


def _fused(cfg: AdamWConfig) -> AdamKernel:
    def kernel(u: AdamUpdate) -> None:
        scale: Tensor | None = u.factor.reciprocal()  # the kernel divides by it
        if u.values[0].dtype == torch.float64:  # the kernel reads the scale in fp32 only
            scale = None
            torch._foreach_mul_(u.grads, u.factor)
        torch._fused_adamw_(
            u.values,
            u.grads,
            u.means,
            u.squares,
            [],
            [u.count] * len(u.values),
            lr=u.lr,
            beta1=cfg.beta1,
            beta2=cfg.beta2,
            weight_decay=u.weight_decay,
            eps=cfg.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=u.skip,
        )

    return kernel


def _foreach(cfg: AdamWConfig) -> AdamKernel:
    """The same arithmetic by torch's elementwise operators: the readable reference of the fused kernels."""

    def kernel(u: AdamUpdate) -> None:
        # A first step that is skipped has the count 0, and 0 · ∞ would be no number.
        dtype = u.values[0].dtype
        keep, count = (1 - u.skip).to(dtype), u.count.to(dtype).clamp(min=1)
        size = u.lr / (1 - cfg.beta1**count)
        root = (1 - cfg.beta2**count).sqrt()
        for value, grad, mean, square in zip(u.values, u.grads, u.means, u.squares, strict=True):
            g = without_bad(grad, u.skip) * u.factor
            mean.lerp_(g, keep * (1 - cfg.beta1))
            square.lerp_(g * g, keep * (1 - cfg.beta2))
            value.mul_(1 - keep * (u.lr * u.weight_decay))
            value.sub_(keep * size * mean / (square.sqrt() / root + cfg.eps))

    return kernel


def _apex(cfg: AdamWConfig) -> AdamKernel:
    """NVIDIA apex's multi-tensor kernel.

    Of its two forms the capturable one reads learning rate, step, scale and the wish to skip from the device, as the
    step needs it. It multiplies the gradients by what it calls the inverse scale, overwrites them with that, and
    computes in fp32 whatever the type.
    """
    import amp_C  # pyright: ignore[reportMissingImports]  # its compiled part
    from apex.multi_tensor_apply import multi_tensor_applier  # pyright: ignore[reportMissingImports]

    def kernel(u: AdamUpdate) -> None:
        device = u.values[0].device
        multi_tensor_applier(
            amp_C.multi_tensor_adam_capturable,
            u.skip.int().reshape(1),
            [u.grads, u.values, u.means, u.squares],
            # Filled there: a copy would wait for the device.
            torch.full((1,), u.lr, dtype=torch.float32, device=device),
            cfg.beta1,
            cfg.beta2,
            cfg.eps,
            u.count.int().reshape(1),
            _DECOUPLED_DECAY,
            _BIAS_CORRECTION,
            u.weight_decay,
            u.factor.float().reshape(1),
        )

    return kernel


SquareSum = Callable[[Sequence[Tensor]], Tensor]
"""The sum of squares of gradients (n,) each, a scalar of their precision; of none: a zero in fp32 on the CPU."""


def square_sum(cfg: OptimConfig, device: torch.device) -> SquareSum:
    """The way to add up squares that goes with `optim.impl`.

    Raises:
        UserError: apex is to do it, and does not do it as it should.
    """
    impl = cfg.impl if isinstance(cfg, AdamWConfig) else "auto"
    if not has_apex() or not (impl == "apex" or (impl == "auto" and device.type == "cuda")):
        return squares_one_by_one if device.type == "cpu" else squares_together
    fast = _apex_square_sum()
    for value in (3.0, float("inf"), float("nan")):
        x = torch.linspace(-2.0, 2.0, 5000, device=device)
        x[17] = value
        if not torch.allclose(fast(x), sum_of_squares(x), rtol=1e-4, equal_nan=True):
            message = f"apex, as installed, does not add up squares as it should; {_WAY_OUT}"
            raise UserError(Problem("optim.impl", message))
    return partial(squares_one_by_one, of=lambda x: (sum_of_squares if x.dtype == torch.float64 else fast)(x))


def squares_together(gradients: Sequence[Tensor]) -> Tensor:
    """Of a GPU: one operator over all of them, which adds up chunks of 65536 elements in threads of 128 each."""
    if not gradients:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(list(gradients))).square().sum()


def squares_one_by_one(gradients: Sequence[Tensor], of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Each by itself (`of`; none: `sum_of_squares`), added in their order."""
    of = of or sum_of_squares
    return reduce(torch.add, map(of, gradients)) if gradients else torch.zeros(())


def _apex_square_sum() -> Callable[[Tensor], Tensor]:
    """NVIDIA apex's multi-tensor norm, which adds up in fp32 and lets what is not finite through."""
    import amp_C  # pyright: ignore[reportMissingImports]
    from apex.multi_tensor_apply import multi_tensor_applier  # pyright: ignore[reportMissingImports]

    def kernel(gradient: Tensor) -> Tensor:
        if gradient.numel() == 0:
            return gradient.new_zeros(())
        overflow = torch.zeros(1, dtype=torch.int32, device=gradient.device)
        norm, _ = multi_tensor_applier(amp_C.multi_tensor_l2norm, overflow, [[gradient]], False)
        return norm.square().view(())

    return kernel


_ROW = 1024


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum of squares of all elements, a scalar of the gradient's own precision.

    By rows: torch on CPU adds one long vector up in a few running sums, and in fp32 loses 7e-4 of ten million squares.
    It is also what finds an infinite or NaN gradient: no mask as long as the gradient is made for that.
    """
    flat = gradient.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    squares = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).square().sum()
    return squares + torch.linalg.vector_norm(flat[whole:]).square()


def without_bad(grad: Tensor, skip: Tensor) -> Tensor:
    """The gradient, or zeros where the step is skipped (0 · NaN would be NaN)."""
    return torch.where(skip.bool(), torch.zeros_like(grad), grad)
