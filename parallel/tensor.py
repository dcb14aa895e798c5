"""Tensor parallelism with sequence parallelism, on plain local tensors (Korthikanti et al., 2022, section 4.2).

Between the projections every rank holds 1/tp of the tokens; a column projection gathers the tokens and computes its
share of the output features, a row projection computes partial sums of all features and scatters them to token owners:

    x (N/tp, h) ─ all-gather ─ W_column ─▶ (N, f/tp) ─▶ W_row ─ reduce-scatter ─▶ (N/tp, h)

Backward mirrors it. Only the shard of a column's input is kept for backward; it is gathered again while the input's
gradient is computed, and the input's gradient is scattered while the weight's is computed.

What is left exposed, the gather and the scatter around a product, can travel beside it (`parallel.tensor.overlap`):

    gather    all pieces leave; own rows are multiplied; then those of each piece, as it comes
    scatter   rows of the others are multiplied piece by piece, each leaves at once; own rows are multiplied; the sum
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .comm.collectives import Handle, all_gather, all_to_all, reduce_scatter
from .comm.mesh import Axis
from .comm.shared_memory_collectives import sum_in_rank_order
from .projection import PLAIN, HasWeight, Products, ProjectionComm, linear_into, run_projection


class _Column(ProjectionComm):
    def __init__(self, axis: Axis) -> None:
        self.axis = self.outputs = axis

    def enter(self, x: Tensor) -> Tensor:
        return all_gather(x, self.axis).wait()

    def enter_backward(self, dx: Tensor) -> Handle:
        return reduce_scatter(dx, self.axis)

    def regather(self, x: Tensor) -> Handle:
        return all_gather(x, self.axis)


class _Row(ProjectionComm):
    bias_before_leave = False

    def __init__(self, axis: Axis) -> None:
        self.axis = self.inputs = axis

    def leave(self, y: Tensor) -> Tensor:
        return reduce_scatter(y, self.axis).wait()

    def leave_backward(self, dy: Tensor) -> Tensor:
        return all_gather(dy, self.axis).wait()


class _ColumnInPieces(_Column):
    """Multiplies while pieces travel; of plain products."""

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], products: Products
    ) -> tuple[list[Tensor], None]:
        outputs = [x.new_empty(len(x) * self.axis.size, len(weight)) for weight in weights]

        def multiply(rows: Tensor, at: int) -> None:
            for y, weight, bias in zip(outputs, weights, biases, strict=True):
                linear_into(y[at : at + len(rows)], rows, weight, bias)

        _gather_beside(x, self.axis, multiply)
        return outputs, None

    def backward(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        products: Products,
        told: None,
        wanted: bool,
        last: bool,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Handle | None]:
        if not (wanted and last):  # or the product of the weights' gradients hides it
            return super().backward(grads, weights, products, told, wanted, last)

        def multiply(out: Tensor, start: int, stop: int) -> None:
            torch.mm(grads[0][start:stop], weights[0], out=out)
            for dy, weight in zip(grads[1:], weights[1:], strict=True):
                out.addmm_(dy[start:stop], weight)

        dx = _scatter_beside(
            grads[0].new_empty(len(grads[0]) // self.axis.size, weights[0].shape[1]), self.axis, multiply
        )
        return grads, grads, dx


class _RowInPieces(_Row):
    """Multiplies while pieces travel; of plain products."""

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], products: Products
    ) -> tuple[list[Tensor], None]:
        travelling = []
        for weight in weights:

            def multiply(out: Tensor, start: int, stop: int, weight: Tensor = weight) -> None:
                linear_into(out, x[start:stop], weight, None)

            own = x.new_empty(len(x) // self.axis.size, len(weight))
            travelling.append(_scatter_beside(own, self.axis, multiply))
        outputs = [y.wait() for y in travelling]
        return [y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True)], None

    def backward(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        products: Products,
        told: None,
        wanted: bool,
        last: bool,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Handle | None]:
        if not wanted:
            return super().backward(grads, weights, products, told, wanted, last)
        rows = len(grads[0]) * self.axis.size
        dys, dx = [dy.new_empty(rows, dy.shape[1]) for dy in grads], grads[0].new_empty(rows, weights[0].shape[1])
        for whole, dy, weight in zip(dys, grads, weights, strict=True):

            def multiply(rows: Tensor, at: int, whole: Tensor = whole, weight: Tensor = weight) -> None:
                here = slice(at, at + len(rows))
                whole[here] = rows
                torch.mm(rows, weight, out=dx[here]) if whole is dys[0] else dx[here].addmm_(rows, weight)

            _gather_beside(dy.contiguous(), self.axis, multiply)
        return dys, dys, Handle(dx)


PIECES = 2
"""Of a rank's rows. Own rows hide the first one's way; more pieces are smaller products."""


def _pieces(rows: int) -> list[tuple[int, int]]:
    """First row and last row + 1 of each piece."""
    ends = [rows * i // PIECES for i in range(PIECES + 1)]
    return [(start, stop) for start, stop in pairwise(ends) if start < stop]


def _gather_beside(x: Tensor, axis: Axis, multiply: Callable[[Tensor, int], None]) -> None:
    """Calls `multiply(rows, at)` for all ranks' x (n, …), own rows first, where `at` is their place in the whole."""
    n = len(x)
    coming = [(start, all_gather(x[start:stop], axis)) for start, stop in _pieces(n)]
    multiply(x, axis.rank * n)
    for start, piece in coming:
        for rank, rows in enumerate(piece.wait().chunk(axis.size)):
            if rank != axis.rank:
                multiply(rows, rank * n + start)


def _scatter_beside(own: Tensor, axis: Axis, multiply: Callable[[Tensor, int, int], None]) -> Handle:
    """own (n, width) becomes the sum over the ranks, in their order, of its rows of a product (size · n, width), of
    which `multiply(out, start, stop)` makes rows."""
    n, others, coming = len(own), [rank for rank in range(axis.size) if rank != axis.rank], []
    for start, stop in _pieces(n):
        made = own.new_empty(len(others), stop - start, own.shape[1])
        for place, rank in enumerate(others):
            multiply(made[place], rank * n + start, rank * n + stop)
        rows = [0 if rank == axis.rank else stop - start for rank in range(axis.size)]
        coming.append((own[start:stop], all_to_all(made.flatten(0, 1), axis, rows, rows)))
    multiply(own, axis.rank * n, (axis.rank + 1) * n)

    def finish() -> Tensor:
        for mine, piece in coming:
            theirs = piece.wait().view(len(others), *mine.shape)
            parts = torch.cat((theirs[: axis.rank], mine[None], theirs[axis.rank :])) if len(others) > 1 else None
            torch.add(theirs[0], mine, out=mine) if parts is None else sum_in_rank_order(parts, mine)
        return own

    return Handle(own, finish)


class ColumnProjection:
    """Output features sharded: x (N/tp, in) → y (N, out/tp) per linear."""

    def __init__(self, axis: Axis, products: Products = PLAIN, *, pieces: bool = False) -> None:
        self._around, self._products = (_ColumnInPieces if pieces else _Column)(axis), products

    def __call__(self, x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
        return run_projection(x, linears, self._around, self._products)


class RowProjection:
    """Input features sharded: x (N, in/tp) → y (N/tp, out). The bias is whole on every rank and added once."""

    def __init__(self, axis: Axis, products: Products = PLAIN, *, pieces: bool = False) -> None:
        self._around, self._products = (_RowInPieces if pieces else _Row)(axis), products

    def __call__(self, x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
        return run_projection(x, linears, self._around, self._products)
