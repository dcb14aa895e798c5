"""Elementwise parts of the transformer, each with a backward written by hand.

On a CPU they are bound by memory: each function here passes over its tensors as few times as the operators of torch
allow, keeps only what backward needs, and works in place wherever the memory is its own. What a whole row or head is
multiplied by stays in fp32 until the product is rounded once (fp64 and fp32 tensors are computed in their own type): a
factor that is rounded itself is the same error in every element of its row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..parallel.gradients import plain_grad
from ..parallel.kernels.precision import precise

_AT_ONCE = 1 << 17
"""Elements of a half-precision tensor that are held in fp32 at once on a CPU: they stay in a core's cache."""
_AT_ONCE_ON_GPU = 1 << 25
"""128 MiB: enough to fill a GPU, little beside what the layer keeps."""


def _parts(x: Tensor) -> list[slice]:
    """The rows of x (N, …), cut into those that are worked on at once."""
    limit = _AT_ONCE if x.device.type == "cpu" else _AT_ONCE_ON_GPU
    size = max(1, limit // max(1, x[:1].numel()))
    return [slice(first, first + size) for first in range(0, len(x), size)]


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in the factor's precision. A GPU converts on the way; a CPU is faster with a copy first."""
    return x.to(factor.dtype).mul_(factor) if x.device.type == "cpu" else torch.mul(x, factor)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, size: int, total: Total | None) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise(x.dtype)).square_()
        if total is not None:
            norm = total(norm)
        rstd = norm.div_(size).add_(eps).rsqrt_()
        # A parameter is not among the saved tensors: what hooks give back for it has lost its slot.
        ctx.weight, ctx.size, ctx.total = weight, size, total
        ctx.save_for_backward(x, rstd)
        if x.dtype == rstd.dtype:
            return torch.mul(x, rstd).mul_(weight)
        return _normed(x.reshape(-1, x.shape[-1]), rstd.reshape(-1, 1), weight).view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, rstd), weight = ctx.saved_tensors, ctx.weight
        if x.dtype == rstd.dtype:
            dx, dweight = _norm_grads(dy, x, weight, rstd, ctx.size, ctx.total)
        else:
            flat = dy.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
            dx, dweight = _norm_grads_in_parts(*flat, weight.to(rstd.dtype), rstd.reshape(-1, 1), ctx.size, ctx.total)
            dx = dx.view(x.shape)
        return dx, plain_grad(weight, dweight) if ctx.needs_input_grad[1] else None, None, None, None


def _normed(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """x · rstd · weight for x (N, n) and rstd (N, 1), in rstd's precision and rounded once."""
    y, weight = torch.empty_like(x, memory_format=torch.contiguous_format), weight.to(rstd.dtype)
    for rows in _parts(x):
        torch.mul(_times(x[rows], rstd[rows]), weight, out=y[rows])
    return y


def _norm_grads(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, size: int, total: Total | None
) -> tuple[Tensor, Tensor]:
    """dx and dweight, where all is of one type."""
    unit = torch.mul(x, rstd)  # x / rms(x)
    grad = torch.mul(dy, unit)  # dy · x / rms, summed over tokens: weight's gradient
    mean = torch.matmul(grad, weight).unsqueeze(-1)
    if total is not None:
        mean = total(mean)
    mean = mean.div_(size)
    dx = torch.mul(dy, weight).addcmul_(unit, mean, value=-1).mul_(rstd)
    return dx, grad.sum(tuple(range(x.dim() - 1)))


def _norm_grads_in_parts(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, size: int, total: Total | None
) -> tuple[Tensor, Tensor]:
    """The same for dy and x (N, n) in half precision, rstd (N, 1) and weight in fp32, as is dweight."""
    dx, dweight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(weight)
    parts = _parts(x)

    def sums(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        unit = _times(x[rows], rstd[rows])
        grad = torch.mul(unit, dy[rows])
        return unit, grad, torch.mv(grad, weight).unsqueeze(-1)

    means = None if total is None else total(torch.cat([sums(rows)[2] for rows in parts] or [rstd]))
    for rows in parts:
        unit, grad, mean = sums(rows)
        dweight += grad.sum(0)
        mean = (mean if means is None else means[rows]) / size
        wide = torch.mul(dy[rows], weight, out=grad)
        torch.mul(wide.addcmul_(unit, mean, value=-1), rstd[rows], out=dx[rows])
    return dx, dweight


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
        return _in_parts(_clipped, gate, up)[0]

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _in_parts(_clipped_grads, dy, *ctx.saved_tensors, results=2)


def _clipped(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (F.silu(_steep(gate)).mul_(_shifted(up)),)


def _clipped_grads(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    steep = _steep(gate)
    dgate = torch.ops.aten.silu_backward(_shifted(up).mul_(dy), steep).mul_(_SHARPNESS)
    dup = F.silu(steep).mul_(dy).mul_(1 / _SHARPNESS)
    return dgate.masked_fill_(gate > _CLIP, 0), dup.masked_fill_(up.abs() > _CLIP, 0)


def _in_parts(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, results: int = 1) -> tuple[Tensor, ...]:
    """An elementwise function of tensors (N, n) of one type and shape, computed in fp32 or better and rounded once."""
    x = inputs[0]
    dtype = precise(x.dtype)
    if x.dtype == dtype:
        return function(*inputs)
    found = tuple(torch.empty_like(x) for _ in range(results))
    for rows in _parts(x):
        for whole, part in zip(found, function(*(y[rows].to(dtype) for y in inputs)), strict=True):
            whole[rows] = part
    return found


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
    # Heads first in memory, as attention wants them, and back as a projection's output: it costs nothing here.
    out = x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) if direction > 0 else x.new_empty(x.shape)
    if still:
        out[..., :still] = x[..., :still]
    a, b = _pairs(x[..., still:], interleaved)
    turned_a, turned_b = _pairs(out[..., still:], interleaved)
    if x.dtype == cos.dtype:
        torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-direction)
        torch.mul(b, cos, out=turned_b).addcmul_(a, sin, value=direction)
        return out
    for at in _parts(x.transpose(0, 1)):
        c, s = cos[:, at], sin[:, at]
        torch.addcmul(torch.mul(a[:, at], c), b[:, at], s, value=-direction, out=turned_a[:, at])
        torch.addcmul(torch.mul(b[:, at], c), a[:, at], s, value=direction, out=turned_b[:, at])
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the last r dimensions of each head of x (B, T, H, d) by cos and sin (B or 1, T, 1, r/2).

    These are fp32 for half-precision x, and so is the sum of products, which is rounded once.

    Of these r, dimension i is paired with dimension i + r/2, as in the published Llama checkpoints, or, interleaved,
    dimension 2i with 2i + 1, as in DeepSeek's and in RoFormer (arXiv 2104.09864, section 3.2.2).
    """
    return _Rotate.apply(x, cos, sin, interleaved)
