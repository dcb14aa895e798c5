"""SwiGLU in one kernel forward and one backward, computed in fp32 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import compiled
from .operators import operator

_BLOCK = 1024


@compiled
def _forward_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    g = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=there)


@compiled
def _backward_kernel(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    grad = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    part = tl.sigmoid(g)
    tl.store(dgate + at, (grad * u * part * (1 + g * (1 - part))).to(dgate.dtype.element_ty), mask=there)
    tl.store(dup + at, (grad * g * part).to(dup.dtype.element_ty), mask=there)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: _like(gate))
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    y = _like(gate)
    if y.numel():
        grid = (triton.cdiv(y.numel(), _BLOCK),)
        _forward_kernel[grid](gate.contiguous(), up.contiguous(), y, y.numel(), BLOCK=_BLOCK)
    return y


@operator(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda dy, gate, up: (_like(gate), _like(up)),
)
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup."""
    dgate, dup = _like(gate), _like(up)
    if dgate.numel():
        grid = (triton.cdiv(dgate.numel(), _BLOCK),)
        given = dy.contiguous(), gate.contiguous(), up.contiguous()
        _backward_kernel[grid](*given, dgate, dup, dgate.numel(), BLOCK=_BLOCK)
    return dgate, dup


class _TritonGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(dy, *ctx.saved_tensors)


def triton_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up for two tensors of one shape and half-precision type, with autograd once; keeps no product."""
    return _TritonGate.apply(gate, up)
