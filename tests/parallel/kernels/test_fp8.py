"""Matrices in 8 bits: values on the format's grid, the nearest to what they were; products are those of the values.

The grids are made from the formats' definitions (sign, exponent, mantissa), not by torch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.parallel.comm.axis import Axis
from pentad.parallel.fp8 import fp8_products
from pentad.parallel.kernels.fp8 import (
    E4M3,
    E5M2,
    FP8_BLOCK,
    WHOLE,
    Scaled,
    Tile,
    encode,
    largest,
    quantise,
    scale_of,
    scaled_product,
)
from pentad.parallel.projection import LocalProjection

TILES = [(WHOLE, WHOLE), (1, WHOLE), (1, FP8_BLOCK), (FP8_BLOCK, FP8_BLOCK)]
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def grid(kind: torch.dtype) -> Tensor:
    """The format's values from 0 up, those of even codes at even places."""
    mantissa, bias = (3, 7) if kind == E4M3 else (2, 15)
    one = 1 << mantissa
    values = [m / one * 2.0 ** (1 - bias) for m in range(one)]
    values += [(1 + m / one) * 2.0 ** (e - bias) for e in range(1, 32) for m in range(one)]
    return torch.tensor([value for value in values if value <= LARGEST[kind]], dtype=torch.float64)


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """The nearest values of the format's grid, of two those with the even code."""
    values, size = grid(kind), x.double().abs()
    middles = (values[1:] + values[:-1]) / 2
    below, above = torch.searchsorted(middles, size), torch.searchsorted(middles, size, right=True)
    return values[torch.where(below % 2 == 0, below, above)] * x.double().sign()


def scale_by_hand(x: Tensor, kind: torch.dtype) -> float:
    """The smallest power of two that brings the values into the format's range."""
    most, scale = float(x.abs().max()), 2.0**-100
    while most / scale > LARGEST[kind]:
        scale *= 2
    return scale


def tiled(x: Tensor, tile: Tile, kind: torch.dtype) -> Tensor:
    """The values of x (M, K) in 8 bits, tile by tile."""
    out = torch.empty(x.shape, dtype=torch.float64)
    rows, columns = (side or size for side, size in zip(tile, x.shape, strict=True))
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns].double()
            scale = scale_by_hand(part, kind)
            out[i : i + rows, j : j + columns] = rounded(part / scale, kind) * scale
    return out


@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_are_the_nearest_ones_on_the_grid(kind: torch.dtype, tile: Tile, dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(131, 140, generator=draws, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-12, 12, (131, 1), generator=draws).double())
    x = x.to(dtype)
    x[7] = 0
    found = quantise(x, tile, kind)
    assert found.codes.dtype == kind
    assert torch.equal(found.values(torch.float64), tiled(x, tile, kind))
    assert torch.equal(found.values(torch.bfloat16).double(), found.values(torch.float64))  # bf16 loses nothing


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_every_code_keeps_its_value_and_ties_go_to_the_even_one(kind: torch.dtype) -> None:
    values = grid(kind)
    for x in (values, (values[1:] + values[:-1]) / 2):
        row = torch.cat((x, values[-1:]))[None].float()
        for sign in (1, -1):
            found = quantise(sign * row, (WHOLE, WHOLE), kind).values(torch.float64)
            assert torch.equal(found, sign * rounded(row, kind))
    found = quantise(values[None], (WHOLE, WHOLE), kind).values(torch.float64)
    assert torch.equal(found, values[None]) and len(values) == {E4M3: 127, E5M2: 124}[kind]


def test_what_is_not_finite_stays_so_in_its_tile_only() -> None:
    x = torch.ones(3, 4)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    values = quantise(x, (1, WHOLE), E4M3).values(torch.float32)
    assert torch.equal(values[0], x[0]) and values[1:].isnan().all()
    assert largest(torch.empty(0, 4), (1, WHOLE)).shape == (0, 1)
    assert torch.equal(scale_of(torch.tensor([448.0, 449.0, 0.0]), E4M3), torch.tensor([1.0, 2.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_a_product_is_torchs_own_in_eight_bits(dtype: torch.dtype, kind: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(2)
    a, b = (torch.randn(shape, generator=draws) for shape in ((48, 96), (32, 96)))
    mine, theirs = quantise(a, (WHOLE, WHOLE), kind), quantise(3 * b, (WHOLE, WHOLE), E4M3)
    (sa,), (sb,) = mine.scale[0].float(), theirs.scale[0].float()
    expected = torch._scaled_mm(mine.codes, theirs.codes.t(), sa, sb, out_dtype=dtype)
    tolerance = 0.004 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(scaled_product(mine, theirs, dtype), expected, rtol=tolerance, atol=tolerance)


def test_a_transposed_matrix_is_that_of_the_same_values() -> None:
    x = torch.randn(200, 150, generator=torch.Generator().manual_seed(3))
    for tile in ((WHOLE, WHOLE), (FP8_BLOCK, FP8_BLOCK)):
        found = quantise(x, tile, E4M3)
        assert torch.equal(found.t().values(torch.float32), found.values(torch.float32).t())
        assert found.t().codes.is_contiguous()
    assert isinstance(encode(x, torch.ones(1, 1), E4M3), Scaled)


def by_hand(scaling: str, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of one linear, as docs/fp8.md says."""
    tensor, row, line, square = TILES
    if scaling == "tensor":
        a, b, c = tiled(x, tensor, E4M3), tiled(weight, tensor, E4M3), tiled(dy, tensor, E5M2)
        return a @ b.t(), c @ b, c.t() @ a
    if scaling == "row":
        y = tiled(x, row, E4M3) @ tiled(weight, row, E4M3).t()
        dx = tiled(dy, row, E4M3) @ tiled(weight.t(), row, E4M3).t()
        return y, dx, dy.double().t() @ x.double()
    b = tiled(weight, square, E4M3)
    dw = tiled(dy.t(), line, E4M3) @ tiled(x.t(), line, E4M3).t()
    return tiled(x, line, E4M3) @ b.t(), tiled(dy, line, E4M3) @ b, dw


@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_projection_is_the_three_products_of_values_on_the_grid(scaling: str, dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(4)
    x, first, second, bias, dy, more = (
        torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)
        for shape in ((150, 144), (136, 144), (72, 144), (72,), (150, 136), (150, 72))
    )
    leaves = [each.clone().requires_grad_() for each in (x, first, second, bias)]
    linears: list[Any] = [
        SimpleNamespace(weight=leaves[1], bias=None),
        SimpleNamespace(weight=leaves[2], bias=leaves[3]),
    ]
    outputs = LocalProjection(fp8_products(scaling, Axis.single("tokens")))(leaves[0], linears)
    torch.autograd.backward(outputs, (dy, more))
    (y, dx, dw), (z, dx_more, dv) = by_hand(scaling, x, first, dy), by_hand(scaling, x, second, more)
    found = [each.detach() for each in outputs] + [leaf.grad for leaf in leaves]
    expected = (y, z + bias.double(), dx + dx_more, dw, dv, more.double().sum(0))
    tolerance = 1e-13 if dtype == torch.float64 else 0.01
    for mine, value in zip(found, expected, strict=True):
        assert mine is not None and float((mine.double() - value).norm() / value.norm()) < tolerance
