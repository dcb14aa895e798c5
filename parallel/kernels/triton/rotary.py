"""Rotary embedding in one kernel, forward and backward, computed in fp32 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import compiled
from .operators import operator

_HEADS = 8
"""Heads of a token that one program turns."""


@compiled
def _kernel(
    x, cos, sin, y, tokens, heads, pairs, still,
    x_batch, x_token, x_head, y_batch, y_token, y_head, angle_batch,
    direction, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, STILL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    source = x + batch * x_batch + token * x_token + head * x_head
    target = y + batch * y_batch + token * y_token + head * y_head
    if STILL:
        at = tl.arange(0, STILL)[None, :]
        there = (head < heads) & (at < still)
        tl.store(target + at, tl.load(source + at, mask=there, other=0.0), mask=there)
    pair = tl.arange(0, PAIRS)[None, :]
    there = (head < heads) & (pair < pairs)
    angles = batch * angle_batch + token * pairs + pair
    c = tl.load(cos + angles, mask=pair < pairs, other=0.0)
    s = tl.load(sin + angles, mask=pair < pairs, other=0.0) * direction
    if INTERLEAVED:
        one, two = still + 2 * pair, still + 2 * pair + 1
    else:
        one, two = still + pair, still + pairs + pair
    a = tl.load(source + one, mask=there, other=0.0).to(tl.float32)
    b = tl.load(source + two, mask=there, other=0.0).to(tl.float32)
    tl.store(target + one, (a * c - b * s).to(y.dtype.element_ty), mask=there)
    tl.store(target + two, (b * c + a * s).to(y.dtype.element_ty), mask=there)


def _shapes(x: Tensor, cos: Tensor, sin: Tensor, direction: int, interleaved: bool) -> Tensor:
    # Heads first in memory, as attention wants them, and back as a projection's output: it costs nothing here.
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) if direction > 0 else x.new_empty(x.shape)


@operator("rotate(Tensor x, Tensor cos, Tensor sin, int direction, bool interleaved) -> Tensor", _shapes)
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, interleaved: bool) -> Tensor:
    """x (B, T, H, d) with the last 2 p dims turned by (B or 1, T, 1, p) in fp32, forth (1) or back (−1)."""
    y = _shapes(x, cos, sin, direction, interleaved)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, tokens, heads, width), pairs = x.shape, cos.shape[-1]
    still = width - 2 * pairs
    if x.numel():
        _kernel[(batch * tokens, triton.cdiv(heads, _HEADS))](
            x, cos.contiguous(), sin.contiguous(), y, tokens, heads, pairs, still,
            *x.stride()[:3], *y.stride()[:3], tokens * pairs if len(cos) > 1 else 0, float(direction),
            INTERLEAVED=interleaved, HEADS=_HEADS, PAIRS=triton.next_power_of_2(pairs),
            STILL=triton.next_power_of_2(still) if still else 0,
        )  # fmt: skip
    return y


class _TritonRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1, ctx.interleaved), None, None, None


def triton_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of x (B, T, H, d) in half precision; arguments as of `models.functional.rotate`."""
    return _TritonRotation.apply(x, cos, sin, interleaved)
