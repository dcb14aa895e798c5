"""Rows of tokens into the order of their experts and back, one launch each way, computed in fp32 and rounded once.

Shapes: n tokens, K assignments of a token, R rows, h features. `places` (n, K) says in which row each assignment
stands, -1: in none. Every sum has one order, so a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import compiled
from .operators import operator

_BLOCK = 2048
"""Features that one program copies or sums."""


@compiled
def _gather_kernel(x, tokens, rows, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    token = tl.load(tokens + row)
    tl.store(rows + row * size + at, tl.load(x + token * size + at, mask=there, other=0.0), mask=there)


@compiled
def _sum_kernel(rows, places, weights, y, count, size, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(count):
        place = tl.load(places + token * count + k)
        mine = at < tl.where(place >= 0, size, 0)
        found = tl.load(rows + place * size + at, mask=mine, other=0.0).to(tl.float32)
        if WEIGHTED:
            found *= tl.load(weights + token * count + k).to(tl.float32)
        total += found
    tl.store(y + token * size + at, total.to(y.dtype.element_ty), mask=there)


@compiled
def _back_kernel(
    dy, places, weights, rows, drows, dweights, count, size, WEIGHTED: tl.constexpr, DOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    grad = tl.load(dy + token * size + at, mask=there, other=0.0).to(tl.float32)
    for k in range(count):
        place = tl.load(places + token * count + k)
        mine = at < tl.where(place >= 0, size, 0)
        if DOTS:
            row = tl.load(rows + place * size + at, mask=mine, other=0.0).to(tl.float32)
            tl.store(dweights + token * count + k, tl.sum(row * grad, 0).to(dweights.dtype.element_ty))
        factor = 1.0
        if WEIGHTED:
            factor = tl.load(weights + token * count + k).to(tl.float32)
        tl.store(drows + place * size + at, (grad * factor).to(drows.dtype.element_ty), mask=mine)


@operator("spread_rows(Tensor x, Tensor tokens) -> Tensor", lambda x, tokens: x.new_empty((len(tokens), x.shape[1])))
def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """x[tokens]: (n, h) → (R, h)."""
    rows, size = x.new_empty((len(tokens), x.shape[1])), x.shape[1]
    if rows.numel():
        block = min(_BLOCK, max(16, triton.next_power_of_2(size)))
        _gather_kernel[(len(tokens), triton.cdiv(size, block))](x.contiguous(), tokens, rows, size, BLOCK=block)
    return rows


@operator(
    "combine_rows(Tensor rows, Tensor places, Tensor? weights) -> Tensor",
    lambda rows, places, weights: rows.new_empty((len(places), rows.shape[1])),
)
def _sum(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_k weights[t, k] · rows[places[t, k]] as (n, h); without weights they are 1."""
    (n, count), size = places.shape, rows.shape[1]
    y = rows.new_empty((n, size))
    if y.numel():
        block = min(_BLOCK, max(16, triton.next_power_of_2(size)))
        factors = places if weights is None else weights.contiguous()
        _sum_kernel[(n, triton.cdiv(size, block))](
            rows.contiguous(), places.contiguous(), factors, y, count, size, WEIGHTED=weights is not None, BLOCK=block
        )
    return y


def _back_shapes(
    dy: Tensor, places: Tensor, weights: Tensor | None, rows: Tensor | None, count: int, padded: bool
) -> tuple[Tensor, Tensor]:
    make = dy.new_zeros if padded else dy.new_empty
    dweights = dy.new_empty(0) if weights is None or rows is None else torch.empty_like(weights)
    return make((count, dy.shape[1])), dweights


@operator(
    "combine_rows_backward(Tensor dy, Tensor places, Tensor? weights, Tensor? rows, int count, bool padded)"
    " -> (Tensor, Tensor)",
    _back_shapes,
)
def _back(
    dy: Tensor, places: Tensor, weights: Tensor | None, rows: Tensor | None, count: int, padded: bool
) -> tuple[Tensor, Tensor]:
    """drows (count, h), 0 where `padded` rows are in no place, and with `rows` dweights (n, K)."""
    drows, dweights = _back_shapes(dy, places, weights, rows, count, padded)
    if places.numel() and dy.shape[1]:
        dots = weights is not None and rows is not None
        _back_kernel[(len(places),)](
            dy.contiguous(), places.contiguous(), places if weights is None else weights.contiguous(),
            rows.contiguous() if rows is not None else dy, drows, dweights, places.shape[1], dy.shape[1],
            WEIGHTED=weights is not None, DOTS=dots, BLOCK=max(16, triton.next_power_of_2(dy.shape[1])),
        )  # fmt: skip
    return drows, dweights


class _TritonSpread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return _gather(x, tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return _sum(dy, places, None), None, None


class _TritonCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, weights: Tensor | None, padded: bool) -> Tensor:
        ctx.count, ctx.padded = len(rows), padded
        ctx.save_for_backward(places, weights, rows if ctx.needs_input_grad[2] else None)
        return _sum(rows, places, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        places, weights, rows = ctx.saved_tensors
        drows, dweights = _back(dy, places, weights, rows, ctx.count, ctx.padded)
        return drows, None, dweights if ctx.needs_input_grad[2] else None, None


def triton_spread(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """As `parallel.expert.permute.spread`, for x (n, h) of any floating type."""
    return _TritonSpread.apply(x, tokens, places)


def triton_combine(rows: Tensor, places: Tensor, weights: Tensor | None = None, padded: bool = True) -> Tensor:
    """As `parallel.expert.permute.combine`, for rows (R, h) of half precision."""
    return _TritonCombine.apply(rows, places, weights, padded)
