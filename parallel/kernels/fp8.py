"""Matrices in 8 bits with scales, and their products.

A value is code · scale: the code is on the grid of E4M3 (up to 448, steps of 1/8) or E5M2 (up to 57344, steps of 1/4;
Micikevicius et al., 2022), the scale a power of two, which a tile of the matrix shares. So every value is exact in
bf16 too, and the product of two such matrices that a CPU computes of bf16 or fp32 operands is what a GPU's 8-bit
product is: exact products, summed in fp32, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import precise

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8_BLOCK = 128
WHOLE = 0
"""In a tile: all rows, or all columns."""
_EXPONENTS = (-100, 120)
"""Of scales; a matrix of zeros has some scale too, and codes · scale stay normal numbers in bf16."""

Tile = tuple[int, int]
"""Rows and columns that share a scale, each 1, `FP8_BLOCK` or `WHOLE`."""


@dataclass(frozen=True)
class Scaled:
    """A matrix in 8 bits.

    Args:
        codes: (…, M, K).
        scale: (…, M', K') in the type of sums: 1 for all rows, one each, or one for each block of rows, the last of
            which may be smaller; columns alike.
    """

    codes: Tensor
    scale: Tensor

    def t(self) -> Scaled:
        """The transposed matrix (…, K, M), its codes in order."""
        return Scaled(self.codes.mT.contiguous(), self.scale.mT)

    def values(self, dtype: torch.dtype) -> Tensor:
        """(…, M, K) in a type that holds them."""
        return self.codes.to(dtype).mul_(_spread(self.scale, self.codes).to(dtype))


def largest(x: Tensor, tile: Tile) -> Tensor:
    """The largest magnitude in each tile of x (…, M, K), as (…, M', K') in the type of sums; NaN where there is one."""
    (m, k), (rows, columns) = x.shape[-2:], (side or size for side, size in zip(tile, x.shape[-2:], strict=True))
    if m % max(rows, 1) or k % columns:
        x = torch.nn.functional.pad(x, (0, -k % columns, 0, -m % rows))
    tiles = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, max(rows, 1)))
    return torch.linalg.vector_norm(tiles, torch.inf, (-3, -1)).to(precise(x.dtype))


def scale_of(found: Tensor, kind: torch.dtype) -> Tensor:
    """The smallest powers of two that bring magnitudes up to `found` (…) into a format's range; NaN for none finite."""
    quotient = found / torch.finfo(kind).max
    mantissa, exponent = torch.frexp(quotient)
    power = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(*_EXPONENTS)
    return ((power + 127) << 23).view(torch.float32).to(found.dtype) + 0 * quotient


def encode(x: Tensor, scale: Tensor, kind: torch.dtype) -> Scaled:
    """x (…, M, K) in 8 bits with given scales (…, M', K'), rounded to the nearest code, ties to even."""
    return Scaled((x * _spread(scale.reciprocal(), x).to(x.dtype)).to(kind), scale)


def quantise(x: Tensor, tile: Tile, kind: torch.dtype) -> Scaled:
    """x (…, M, K) in 8 bits, each tile with the scale that its largest magnitude needs."""
    return encode(x, scale_of(largest(x, tile), kind), kind)


def _spread(scale: Tensor, x: Tensor) -> Tensor:
    """Scales (…, M', K') so that they multiply x (…, M, K)."""
    for dim in (-2, -1):
        if scale.shape[dim] not in (1, x.shape[dim]):
            scale = scale.repeat_interleave(FP8_BLOCK, dim).narrow(dim, 0, x.shape[dim])
    return scale


def scaled_product(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a bᵀ (M, N) in `dtype`, for a (M, K) and b (N, K), summed in fp32 (fp64: in fp64).

    Tiles are whole matrices or whole rows of both, or 1 × 128 of one and 1 × 128 or 128 × 128 of the other.
    """
    if not a.codes.is_cuda:
        return torch.mm(a.values(dtype), b.values(dtype).t())
    # Of two 5-bit exponents there is no kernel, and sums of 8-bit tensor cores keep 14 bits in the fast mode.
    return torch._scaled_mm(a.codes, b.codes.t(), _on_gpu(a), _on_gpu(b).t(), out_dtype=dtype, use_fast_accum=False)


def _on_gpu(x: Scaled) -> Tensor:
    """Scales (M', K') as cuBLAS reads them: of single rows' blocks column by column; of square blocks row by row, these
    a multiple of 16 bytes apart."""
    rows, blocks = x.scale.shape
    if blocks == 1 and rows in (1, len(x.codes)):
        return x.scale.contiguous()
    if rows == len(x.codes):
        return x.scale.t().contiguous().t()
    return torch.nn.functional.pad(x.scale, (0, -blocks % 4))[:, :blocks]
