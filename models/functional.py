"""Elementwise parts of the transformer, each with a backward written by hand.

On a CPU they are bound by memory: each function here passes over its tensors as few times as the operators of torch
allow, keeps only what backward needs, and works in place wherever the memory is its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..parallel.gradients import plain_grad


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, size: int, total: Total | None) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_sum_dtype(x.dtype)).square_()
        if total is not None:
            norm = total(norm)
        rstd = norm.div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.size, ctx.total = size, total
        return torch.mul(x, rstd.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        unit = torch.mul(x, rstd.to(x.dtype))  # x / rms(x)
        grad = torch.mul(dy, unit)  # dy · x / rms, summed over tokens: weight's gradient
        dims = tuple(range(x.dim() - 1))
        dweight = plain_grad(weight, grad.sum(dims, dtype=rstd.dtype)) if ctx.needs_input_grad[1] else None
        mean = torch.matmul(grad, weight).unsqueeze(-1)
        if ctx.total is not None:
            mean = ctx.total(mean.to(rstd.dtype)).to(x.dtype)
        mean = mean.div_(ctx.size)
        dx = torch.mul(dy, weight).addcmul_(unit, mean, value=-1).mul_(rstd.to(x.dtype))
        return dx, dweight, None, None, None


Total = Callable[[Tensor], Tensor]
"""Partial sums over the part of a dim that is at hand → the sums over the whole dim; may work in place."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, size: int | None = None, total: Total | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim (Zhang and Sennrich, 2019).

    Args:
        x: (…, n).
        weight: (n,).
        eps: added to the mean square.
        size: of the whole last dim, where x has only n of it; none: n.
        total: sums over the whole last dim, forward and backward; none: x has all of it.
    """
    return _RmsNorm.apply(x, weight, eps, size or x.shape[-1], total)


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


_SHARPNESS = 1.702
_CLIP = 7.0
"""GPT-OSS's constants: the gate is gate · sigmoid(1.702 gate), both inputs are clipped at 7."""


class _SwiGluClipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(_steep(gate)).mul_(_shifted(up))

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        steep = _steep(gate)
        dgate = torch.ops.aten.silu_backward(_shifted(up).mul_(dy), steep).mul_(_SHARPNESS)
        dup = F.silu(steep).mul_(dy).mul_(1 / _SHARPNESS)
        return dgate.masked_fill_(gate > _CLIP, 0), dup.masked_fill_(up.abs() > _CLIP, 0)


def _steep(gate: Tensor) -> Tensor:
    """The argument of silu: g · sigmoid(c g) = silu(c g) / c."""
    return gate.clamp(max=_CLIP).mul_(_SHARPNESS)


def _shifted(up: Tensor) -> Tensor:
    """(clip(up) + 1) / c."""
    return up.clamp(-_CLIP, _CLIP).add_(1).mul_(1 / _SHARPNESS)


def swiglu_clipped(gate: Tensor, up: Tensor) -> Tensor:
    """(u + 1) · g · sigmoid(1.702 g) with g = min(gate, 7) and u = up clipped to [-7, 7] (GPT-OSS's model code)."""
    return _SwiGluClipped.apply(gate, up)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int, interleaved: bool) -> Tensor:
    still = x.shape[-1] - 2 * cos.shape[-1]
    # Heads first in memory, as attention wants them: the transposition costs nothing here.
    out = x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    if still:
        out[..., :still] = x[..., :still]
    a, b = _pairs(x[..., still:], interleaved)
    turned_a, turned_b = _pairs(out[..., still:], interleaved)
    torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=turned_b).addcmul_(a, sin, value=direction)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the last r dimensions of each head of x (B, T, H, d) by cos and sin (B or 1, T, 1, r/2).

    Of these r, dimension i is paired with dimension i + r/2, as in the published Llama checkpoints, or, interleaved,
    dimension 2i with 2i + 1, as in DeepSeek's and in RoFormer (arXiv 2104.09864, section 3.2.2).
    """
    return _Rotate.apply(x, cos, sin, interleaved)
