"""RMSNorm over the last dim in one kernel forward and two backward, computed in fp32 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gradients import add_in_place
from .jit import compiled
from .operators import operator, programs_of


@compiled
def _forward_kernel(x, weight, y, rstd, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    values = tl.load(x + row * size + at, mask=there, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    tl.store(rstd + row, factor)
    scaled = values * factor * tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, scaled.to(y.dtype.element_ty), mask=there)


@compiled
def _backward_kernel(dy, x, weight, rstd, dx, partial, rows, size, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    scale = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        factor = tl.load(rstd + row)
        unit = tl.load(x + row * size + at, mask=there, other=0.0).to(tl.float32) * factor
        grad = tl.load(dy + row * size + at, mask=there, other=0.0).to(tl.float32)
        total += grad * unit
        wide = grad * scale
        mean = tl.sum(wide * unit, 0) / size
        tl.store(dx + row * size + at, ((wide - unit * mean) * factor).to(dx.dtype.element_ty), mask=there)
    tl.store(partial + program * size + at, total, mask=there)


@compiled
def _sum_kernel(partial, total, count, size, FRESH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    found = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        found += tl.load(partial + part * size + at, mask=there, other=0.0)
    if not FRESH:
        found += tl.load(total + at, mask=there, other=0.0).to(tl.float32)
    tl.store(total + at, found.to(total.dtype.element_ty), mask=there)


def _forward_shapes(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _forward_shapes)
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y like x (…, n), and 1 / rms (…) in fp32."""
    y, rstd = _forward_shapes(x, weight, eps)
    size = x.shape[-1]
    if x.numel():
        _forward_kernel[(rstd.numel(),)](x.contiguous(), weight, y, rstd, size, eps, BLOCK=triton.next_power_of_2(size))
    return y, rstd


def _backward_shapes(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, total: Tensor, fresh: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor(a!) total, bool fresh) -> Tensor",
    _backward_shapes,
    launches=2,
)
def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, total: Tensor, fresh: bool) -> Tensor:
    """dx; the weight's gradient becomes (fresh) or is added to total (n,)."""
    dx = _backward_shapes(dy, x, weight, rstd, total, fresh)
    size, rows = x.shape[-1], rstd.numel()
    count, block = max(1, min(programs_of(x), rows)), triton.next_power_of_2(size)
    partial = x.new_empty((count, size), dtype=torch.float32)
    _backward_kernel[(count,)](dy.contiguous(), x.contiguous(), weight, rstd, dx, partial, rows, size, BLOCK=block)
    _sum_kernel[(triton.cdiv(size, 256),)](partial, total, count, size, FRESH=fresh, BLOCK=256)
    return dx


class _TritonNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        # A parameter is not among the saved tensors: what hooks give back for it has lost its slot.
        ctx.weight = weight
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, rstd), weight = ctx.saved_tensors, ctx.weight
        if not ctx.needs_input_grad[1]:
            return _backward(dy, x, weight, rstd, torch.empty_like(weight, dtype=torch.float32), True), None, None
        dx, dweight = add_in_place(weight, lambda total, fresh: _backward(dy, x, weight, rstd, total, fresh))
        return dx, dweight, None


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim, x (…, n) in half precision, with autograd once."""
    return _TritonNorm.apply(x, weight, eps)
