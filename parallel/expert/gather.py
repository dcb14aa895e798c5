"""The all-gather dispatcher: every rank sees all tokens. Nothing in it can go astray, so others are checked against it.

It gives the same bits as the all-to-all: each expert sees the same rows in the same order, each result comes back as a
sum of one value and zeros, and a token's K results are added up at home. On the way there a rank receives ep · etp
times its tokens, on the way back K times as much (the all-to-all: K times its tokens, both ways).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm.collectives import all_gather, reduce_scatter
from ..comm.mesh import Axis
from ..grouped_projection import Groups
from .dispatch import Arrived, Phases
from .plan import Assignments
from .routing import Routing


@dataclass
class _GatheredRows:
    found: Assignments
    rows: Tensor
    """(n · K, h): tokens, later results, of this rank's assignments."""
    weights: Tensor | None
    copies: int
    """K: so many rows are the same token at first."""


class AllGather(Phases[_GatheredRows]):
    """Tokens, ids and weights are gathered over the expert mesh; all its ranks have the same number of tokens.

    A capacity needs no padding here, and there is nothing to cut into chunks.

    Args:
        experts: of the whole layer.
        ep: the ranks that share the experts.
        etp: the ranks that share each expert's inner width.
        weigh_before: the weights are multiplied before the experts' second matrix.
    """

    def __init__(self, experts: int, ep: Axis, etp: Axis, *, weigh_before: bool = False) -> None:
        super().__init__()
        self.experts, self.ep, self.etp, self.weigh_before = experts, ep, etp, weigh_before

    def prepare(self, x: Tensor, routing: Routing) -> list[_GatheredRows]:
        n, k = routing.experts.shape
        home = torch.arange(n * k, device=x.device)
        rows = self.rows.spread(x, home // k, _places(routing))
        weights = routing.weights.reshape(n * k, 1) if self.weigh_before else None
        return [_GatheredRows(self._found(routing), rows, weights, k)]

    def dispatch(self, journey: _GatheredRows) -> None:
        """Nothing: `arrange` knows which rows to keep."""

    def arrange(self, journey: _GatheredRows) -> Arrived:
        found = journey.found
        rows = self._gather(journey.rows, found.pairs, journey.copies)
        weights = None if journey.weights is None else self._gather(journey.weights, found.pairs, 1).view(-1)
        return Arrived(rows, found.groups, weights)

    def collect(self, journey: _GatheredRows, out: Tensor) -> None:
        journey.rows = _Scatter.apply(out, journey.found.pairs, len(journey.rows), self.ep, self.etp)

    def combine(self, journey: _GatheredRows) -> None:
        """Nothing: `collect` has summed over all ranks."""

    def finish(self, journeys: list[_GatheredRows], routing: Routing) -> Tensor:
        weights = None if self.weigh_before else routing.weights
        return self.rows.combine(journeys[0].rows, _places(routing), weights)

    def _gather(self, rows: Tensor, pairs: Tensor, copies: int) -> Tensor:
        return _Gather.apply(rows, pairs, copies, self.ep, self.etp)

    def _found(self, routing: Routing) -> Assignments:
        if routing.findings.mine is None:
            ids = _everywhere(routing.experts.reshape(-1), self.ep, self.etp)
            width = self.experts // self.ep.size
            local = ids - self.ep.rank * width
            local = torch.where((local < 0) | (local >= width) | (ids < 0), width, local)
            ordered, order = torch.sort(local, stable=True)
            counts = torch.searchsorted(ordered, torch.arange(width + 1, device=ids.device)).diff().tolist()
            routing.findings.mine = Assignments(order[: sum(counts)], Groups(tuple(counts)))
        return routing.findings.mine


def _places(routing: Routing) -> Tensor:
    """(n, K): every assignment stands where it is, those to nowhere excepted."""
    ids = routing.experts
    home = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    return torch.where(ids < 0, -1, home)


def _everywhere(x: Tensor, ep: Axis, etp: Axis) -> Tensor:
    """(m, …) of each rank → (etp · ep · m, …)."""
    return all_gather(all_gather(x, ep).wait(), etp).wait()


def _home(rows: Tensor, pairs: Tensor, count: int, ep: Axis, etp: Axis) -> Tensor:
    """Rows (R, h) of the assignments `pairs` → (count, h): this rank's assignments, summed over all ranks."""
    whole = rows.new_zeros((count * ep.size * etp.size, *rows.shape[1:]))
    whole[pairs] = rows
    return reduce_scatter(reduce_scatter(whole, etp).wait(), ep).wait()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, pairs: Tensor, copies: int, ep: Axis, etp: Axis) -> Tensor:
        ctx.axes, ctx.count = (ep, etp), len(rows)
        ctx.save_for_backward(pairs)
        return _everywhere(rows[::copies], ep, etp).index_select(0, pairs // copies)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (pairs,) = ctx.saved_tensors
        return _home(grad, pairs, ctx.count, *ctx.axes), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, pairs: Tensor, count: int, ep: Axis, etp: Axis) -> Tensor:
        ctx.axes = (ep, etp)
        ctx.save_for_backward(pairs)
        return _home(out, pairs, count, ep, etp)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (pairs,) = ctx.saved_tensors
        return _everywhere(grad, *ctx.axes).index_select(0, pairs), None, None, None, None
