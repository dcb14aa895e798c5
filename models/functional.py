"""Elementwise parts of the transformer, each with a backward written by hand.

On a CPU they are bound by memory: each function here passes over its tensors as few times as the operators of torch
allow, keeps only what backward needs, and works in place wherever the memory is its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..parallel.gradients import plain_grad


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_sum_dtype(x.dtype))
        rstd = norm.square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return torch.mul(x, rstd.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        size = x.shape[-1]
        unit = torch.mul(x, rstd.to(x.dtype))  # x / rms(x)
        grad = torch.mul(dy, unit)  # dy · x / rms, summed over tokens: weight's gradient
        dims = tuple(range(x.dim() - 1))
        dweight = plain_grad(weight, grad.sum(dims, dtype=rstd.dtype)) if ctx.needs_input_grad[1] else None
        mean = torch.matmul(grad, weight).unsqueeze(-1).div_(size)
        dx = torch.mul(dy, weight).addcmul_(unit, mean, value=-1).mul_(rstd.to(x.dtype))
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim (Zhang and Sennrich, 2019)."""
    return _RmsNorm.apply(x, weight, eps)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(torch.mul(dy, up), gate)
        return dgate, F.silu(gate).mul_(dy)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer, 2020). The product is made again in backward rather than kept."""
    return _SwiGlu.apply(gate, up)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    # Heads first in memory, as attention wants them: the transposition costs nothing here.
    out = x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin, value=direction)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, d) by the angles of cos and sin (B or 1, T, 1, d/2).

    Dimension i is paired with dimension i + d/2, as in the published Llama checkpoints.
    """
    return _Rotate.apply(x, cos, sin)
