"""Products of linears in 8 bits (`train.fp8`), for any layout with the numbers of one process.

Which tiles of an operand share a scale decides which products are in 8 bits, and who has to agree on the scales:

    scaling   x                    W                       dy                    products in 8 bits
    tensor    E4M3, whole          E4M3, whole             E5M2, whole           x Wᵀ, dy W, dyᵀ x
    row       E4M3, each token     E4M3, each of the       E4M3, each token      x Wᵀ, dy W
                                   rows of its product
    block     E4M3, 1 × 128        E4M3, 128 × 128         E4M3, 1 × 128         x Wᵀ, dy W, dyᵀ x

An operand that is cut takes the largest magnitude of all ranks that hold it: for whole tensors those that share a
microbatch, for rows those of the axis along which the row is cut. Blocks lie within ranks. Experts are scaled by row
whatever the scaling: an expert's rows are of several microbatches, in numbers that the layout decides.

Sources: per-tensor with current maxima as in Transformer Engine; by row as in torchao's recipe with weight gradients
in high precision; blocks as DeepSeek-V3 (arXiv 2412.19437, section 3.3), with scales along the tokens for dyᵀ x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .comm.axis import Axis
from .comm.collectives import all_reduce
from .gradients import matmul_grad, plain_grad
from .kernels.fp8 import E4M3, E5M2, FP8_BLOCK, WHOLE, Scaled, Tile, encode, largest, quantise, scale_of, scaled_product
from .kernels.grouped_gemm import Gemms, Groups
from .kernels.precision import precise
from .projection import Products

_WHOLE, _ROW, _LINE, _SQUARE = (WHOLE, WHOLE), (1, WHOLE), (1, FP8_BLOCK), (FP8_BLOCK, FP8_BLOCK)


def fp8_products(scaling: str, tokens: Axis) -> Products:
    """The products of `train.fp8`.

    Args:
        tokens: the ranks that share a microbatch.
    """
    return {"tensor": _ByTensor, "row": _ByRow, "block": _ByBlock}[scaling](tokens)


def agreed_scales(operands: Sequence[Tensor], tile: Tile, kind: torch.dtype, axis: Axis | None) -> list[Tensor]:
    """Scales of matrices (…, M, K) of which the ranks of an axis have parts (none: this rank has all), with one
    exchange for all of them."""
    found = [largest(x, tile) for x in operands]
    if axis is not None and axis.size > 1:
        flat = torch.cat([each.flatten() for each in found])
        parts = all_reduce(flat, axis, "max").wait().split([each.numel() for each in found])
        found = [part.view(each.shape) for part, each in zip(parts, found, strict=True)]
    return [scale_of(each, kind) for each in found]


@dataclass(frozen=True)
class _ByTensor:
    tokens: Axis

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], cut: Axis | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        scales = agreed_scales((x, *weights), _WHOLE, E4M3, self.tokens)
        a, *b = (encode(each, scale, E4M3) for each, scale in zip((x, *weights), scales, strict=True))
        return _outputs(a, b, biases, x.dtype), scales

    def backward(
        self, dys: Sequence[Tensor], weights: Sequence[Tensor], cut: Axis | None, told: list[Tensor], wanted: bool
    ) -> tuple[Tensor | None, list[Scaled]]:
        scales = agreed_scales(dys, _WHOLE, E5M2, self.tokens)
        mine = [encode(dy, scale, E5M2) for dy, scale in zip(dys, scales, strict=True)]
        theirs = (encode(weight, scale, E4M3).t() for weight, scale in zip(weights, told[1:], strict=True))
        return _input_gradient(mine, theirs, dys[0].dtype) if wanted else None, mine

    def weight_gradients(
        self, weights: Sequence[Tensor], dys: Sequence[Scaled], x: Tensor, told: list[Tensor]
    ) -> list[Tensor | None]:
        return _weight_gradients(weights, [dy.t() for dy in dys], encode(x, told[0], E4M3).t(), x.dtype)


@dataclass(frozen=True)
class _ByRow:
    tokens: Axis

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], cut: Axis | None
    ) -> tuple[list[Tensor], None]:
        a, *b = _rows((x, *weights), cut)
        return _outputs(a, b, biases, x.dtype), None

    def backward(
        self, dys: Sequence[Tensor], weights: Sequence[Tensor], cut: Axis | None, told: None, wanted: bool
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        if not wanted:
            return None, dys
        operands = _rows((*dys, *(weight.t() for weight in weights)), cut)
        return _input_gradient(operands[: len(dys)], operands[len(dys) :], dys[0].dtype), dys

    def weight_gradients(
        self, weights: Sequence[Tensor], dys: Sequence[Tensor], x: Tensor, told: None
    ) -> list[Tensor | None]:
        return [matmul_grad(weight, dy, x) for weight, dy in zip(weights, dys, strict=True)]


@dataclass(frozen=True)
class _ByBlock:
    tokens: Axis

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], cut: Axis | None
    ) -> tuple[list[Tensor], None]:
        b = (quantise(weight, _SQUARE, E4M3) for weight in weights)
        return _outputs(quantise(x, _LINE, E4M3), b, biases, x.dtype), None

    def backward(
        self, dys: Sequence[Tensor], weights: Sequence[Tensor], cut: Axis | None, told: None, wanted: bool
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        if not wanted:
            return None, dys
        mine = (quantise(dy, _LINE, E4M3) for dy in dys)
        return _input_gradient(mine, (quantise(w, _SQUARE, E4M3).t() for w in weights), dys[0].dtype), dys

    def weight_gradients(
        self, weights: Sequence[Tensor], dys: Sequence[Tensor], x: Tensor, told: None
    ) -> list[Tensor | None]:
        mine = (quantise(dy.t().contiguous(), _LINE, E4M3) for dy in dys)
        return _weight_gradients(weights, mine, quantise(x.t().contiguous(), _LINE, E4M3), x.dtype)


def _rows(operands: Sequence[Tensor], axis: Axis | None) -> list[Scaled]:
    """Each row (…, M, K) with a scale of its own; an axis along which the rows are cut."""
    scales = agreed_scales(operands, _ROW, E4M3, axis)
    return [encode(x.contiguous(), scale, E4M3) for x, scale in zip(operands, scales, strict=True)]


def _outputs(x: Scaled, weights: Iterable[Scaled], biases: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    found = [scaled_product(x, weight, dtype) for weight in weights]
    return [y if bias is None else y.add_(bias) for y, bias in zip(found, biases, strict=True)]


def _input_gradient(dys: Iterable[Scaled], weights: Iterable[Scaled], dtype: torch.dtype) -> Tensor:
    """Σ dy W, for dy (N, out) and transposed weights (in, out)."""
    found = (scaled_product(dy, weight, dtype) for dy, weight in zip(dys, weights, strict=True))
    dx = next(found)
    for more in found:
        dx.add_(more)
    return dx


def _weight_gradients(
    weights: Sequence[Tensor], dys: Iterable[Scaled], x: Scaled, dtype: torch.dtype
) -> list[Tensor | None]:
    """dyᵀ x of transposed dy (out, N) and x (in, N), in the type of sums."""
    return [plain_grad(weight, scaled_product(dy, x, precise(dtype))) for weight, dy in zip(weights, dys, strict=True)]


@dataclass(frozen=True)
class Fp8Experts:
    """Makes the products of experts' linears such in 8 bits.

    Args:
        inputs: the axis over which their input features are cut; none: they are whole.
        outputs: the same for their output features.
    """

    inputs: Axis | None
    outputs: Axis | None

    def __call__(self, gemms: Gemms, groups: Groups) -> Gemms:
        return _Fp8Gemms(gemms, groups, self.inputs, self.outputs)


@dataclass(frozen=True)
class _Fp8Gemms:
    inner: Gemms
    groups: Groups
    inputs: Axis | None
    outputs: Axis | None

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        rows, matrices = _rows((x, weight), self.inputs)
        if x.is_cuda and self.groups.rows:
            return self._grouped(rows, matrices, x.dtype)
        return self.inner.forward(rows.values(x.dtype), matrices.values(x.dtype))

    def backward(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        operands, dtype = _rows((*dys, *(weight.mT for weight in weights)), self.outputs), dys[0].dtype
        rows, matrices = operands[: len(dys)], operands[len(dys) :]
        if not (dys[0].is_cuda and self.groups.rows):
            return self.inner.backward([x.values(dtype) for x in rows], [w.values(dtype).mT for w in matrices])
        found = (self._grouped(dy, weight, dtype) for dy, weight in zip(rows, matrices, strict=True))
        dx = next(found)
        for more in found:
            dx.add_(more)
        return dx

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        self.inner.add_weight(dy, x, total, fresh)

    def _grouped(self, x: Scaled, weight: Scaled, dtype: torch.dtype) -> Tensor:
        """x (R, K) times each expert's matrix (E, N, K), transposed."""
        scales = x.scale.flatten(), weight.scale.squeeze(-1).contiguous()
        ends = self.groups.ends(x.codes.device)
        return torch._scaled_grouped_mm(x.codes, weight.codes.mT, *scales, offs=ends, out_dtype=dtype)
