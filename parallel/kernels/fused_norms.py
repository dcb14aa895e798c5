"""NVIDIA apex's normalisation kernels, behind our weight gradients.

Both compute in fp32 whatever the type, in one pass forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...configs.errors import Problem, UserError
from ..gradients import plain_grad

_WAY_OUT = "set model.norm_impl=torch"


@dataclass(frozen=True)
class NormKernels:
    """Ways to normalise over the last dim.

    Args:
        rms: (x (…, n), weight (n,), eps) → (…, n).
        layer: (x (…, n), weight (n,), bias (n,), eps) → (…, n).
    """

    rms: Callable[[Tensor, Tensor, float], Tensor]
    layer: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def apex_norms(device: torch.device, dtype: torch.dtype) -> NormKernels:
    """apex's kernels, after they were compared with torch's on a few rows.

    Args:
        device, dtype: of what will be normalised.

    Raises:
        UserError: they do not compute what they should.
    """
    import fused_layer_norm_cuda  # pyright: ignore[reportMissingImports]  # apex's compiled part

    kernels = NormKernels(
        lambda x, weight, eps: _Rms.apply(x, weight, eps, fused_layer_norm_cuda),  # pyright: ignore[reportReturnType]
        lambda x, weight, bias, eps: _Layer.apply(x, weight, bias, eps, fused_layer_norm_cuda),  # pyright: ignore[reportReturnType]
    )
    _check(kernels, device, dtype)
    return kernels


class _Rms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, apex: Any) -> Tensor:
        x = x.contiguous()
        y, rstd = apex.rms_forward_affine(x, weight.shape, weight, eps)
        # A parameter is not among the saved tensors: what hooks give back for it has lost its slot.
        ctx.weight, ctx.eps, ctx.apex = weight, eps, apex
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, rstd), weight = ctx.saved_tensors, ctx.weight
        dx, dweight = ctx.apex.rms_backward_affine(dy.contiguous(), rstd, x, weight.shape, weight, ctx.eps, False)
        return dx, plain_grad(weight, dweight) if ctx.needs_input_grad[1] else None, None, None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, apex: Any) -> Tensor:
        x = x.contiguous()
        y, mean, rstd = apex.forward_affine(x, weight.shape, weight, bias, eps)
        ctx.weight, ctx.bias, ctx.eps, ctx.apex = weight, bias, eps, apex
        ctx.save_for_backward(x, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        dx, dweight, dbias = ctx.apex.backward_affine(
            dy.contiguous(), mean, rstd, x, weight.shape, weight, bias, ctx.eps, False
        )
        of_weight = plain_grad(weight, dweight) if ctx.needs_input_grad[1] else None
        return dx, of_weight, plain_grad(bias, dbias) if ctx.needs_input_grad[2] else None, None, None


def _check(kernels: NormKernels, device: torch.device, dtype: torch.dtype) -> None:
    """Compares values and gradients with torch's.

    Raises:
        UserError: they differ by more than rounding.
    """
    eps, width = 1e-3, 64
    draws = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=draws) for shape in ((5, 3, width), (width,), (width,), (5, 3, width))]
    for name, ours, theirs, count in (
        ("RMSNorm", lambda x, w: F.rms_norm(x, (width,), w, eps), lambda x, w: kernels.rms(x, w, eps), 2),
        (
            "LayerNorm",
            lambda x, w, b: F.layer_norm(x, (width,), w, b, eps),
            lambda x, w, b: kernels.layer(x, w, b, eps),
            3,
        ),
    ):
        found = []
        for way, kind in ((ours, torch.float64), (theirs, dtype)):
            # The reference gets what the kernel gets, rounded as it is.
            inputs = [each.to(device, dtype).to(kind).requires_grad_() for each in given[:count]]
            y = way(*inputs)
            grads = torch.autograd.grad(y, inputs, given[3].to(device, dtype).to(kind))
            found.append([each.detach().double() for each in (y, *grads)])
        limit = 0.05 if dtype.itemsize == 2 else 1e-4
        worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))
        if not worst < limit:  # NaN too
            message = f"apex, as installed, does not compute {name} as it should; {_WAY_OUT}"
            raise UserError(Problem("model.norm_impl", message))
