"""The grouped projection: every weight GEMM of a layer's experts goes through here.

The rows of an input stand expert by expert; expert e multiplies its rows by its own matrix:

    x (R, in)  │ rows of expert 0 │ of 1 │ of 2 … │        weight (E, out, in)        y (R, out)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .collectives import Handle
from .gradients import grouped_grad, open_store
from .projection import HasWeight


@dataclass(frozen=True)
class Groups:
    """How many rows each expert has."""

    counts: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(expert, first row, last row + 1), without the experts that have none."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, start, start + count
            start += count


class GroupedProjection(Protocol):
    """Applies the weights of `linears` to x (R, in) and returns one y (R, out) per linear."""

    def __call__(self, x: Tensor, groups: Groups, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]: ...


def local(x: Tensor, groups: Groups, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
    """y_i[rows of e] = x[rows of e] W_i[e]ᵀ."""
    out = _GroupedProject.apply(groups, x, *(linear.weight for linear in linears))
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class _WeightGrads:
    """The weight gradients of one grouped projection, computed at once or left for later."""

    groups: Groups
    x: Tensor
    weights: Sequence[Tensor]
    dys: Sequence[Tensor]

    def start(self) -> Handle:
        return Handle(self.x)

    def finish(self, whole: Tensor) -> list[Tensor | None]:
        runs = tuple(self.groups.runs())
        return [grouped_grad(w, dy, whole, runs) for w, dy in zip(self.weights, self.dys, strict=True)]


class _GroupedProject(torch.autograd.Function):
    """Inputs: groups, x, weights."""

    @staticmethod
    def forward(ctx, groups: Groups, x: Tensor, *weights: Tensor) -> Any:
        outputs = []
        for weight in weights:
            y = x.new_empty(x.shape[0], weight.shape[1])
            for expert, start, stop in groups.runs():
                torch.mm(x[start:stop], weight[expert].t(), out=y[start:stop])
            outputs.append(y)
        ctx.groups = groups
        ctx.save_for_backward(x, *weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        groups: Groups = ctx.groups
        x, *weights = ctx.saved_tensors
        dys = tuple(dy.contiguous() for dy in dys)
        dx = torch.empty_like(x)
        for expert, start, stop in groups.runs():
            rows = dx[start:stop]
            torch.mm(dys[0][start:stop], weights[0][expert], out=rows)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                rows.addmm_(dy[start:stop], weight[expert])
        deferred = _WeightGrads(groups, x, weights, dys)
        store = open_store(weights)
        if store is not None:
            store.put(deferred)
            return None, dx, *([None] * len(weights))
        return None, dx, *deferred.finish(x)
