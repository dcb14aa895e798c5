"""Tensor parallelism with sequence parallelism, on plain local tensors (Korthikanti et al., 2022, section 4.2).

Between the projections every rank holds 1/tp of the tokens; a column projection gathers the tokens and computes its
share of the output features, a row projection computes partial sums of all features and scatters them to token owners:

    x (N/tp, h) ─ all-gather ─ W_column ─▶ (N, f/tp) ─▶ W_row ─ reduce-scatter ─▶ (N/tp, h)

Backward mirrors it. Only the shard of a column's input is kept for backward; it is gathered again while the input's
gradient is computed, and the input's gradient is scattered while the weight's is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .comm.collectives import Handle, all_gather, reduce_scatter
from .comm.mesh import Axis
from .projection import PLAIN, HasWeight, Products, ProjectionComm, run_projection


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


class ColumnProjection:
    """Output features sharded: x (N/tp, in) → y (N, out/tp) per linear."""

    def __init__(self, axis: Axis, products: Products = PLAIN) -> None:
        self._around, self._products = _Column(axis), products

    def __call__(self, x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
        return run_projection(x, linears, self._around, self._products)


class RowProjection:
    """Input features sharded: x (N, in/tp) → y (N/tp, out). The bias is whole on every rank and added once."""

    def __init__(self, axis: Axis, products: Products = PLAIN) -> None:
        self._around, self._products = _Row(axis), products

    def __call__(self, x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
        return run_projection(x, linears, self._around, self._products)
