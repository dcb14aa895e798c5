"""Dispatchers: they bring tokens to the ranks of their experts and the results back, in six phases.

prepare    local            which row goes where
dispatch   communication    rows leave                   behind it: `beside`, and the experts of earlier chunks
arrange    etp              rows in the order of the experts, each on all ranks that share its expert
(experts)
collect    etp              results summed over these ranks, in the order in which the rows came
combine    communication    results leave                behind it: the experts of later chunks
finish     local            each token's weighted sum
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..comm.mesh import Axis
from ..grouped_projection import Groups
from . import permute
from .plan import Chunk, RowPlan, by_capacity, by_count
from .routing import Routing
from .row_kernels import RowKernels
from .travel import AsyncAllToAll, gather_rows, scatter_rows

T = TypeVar("T")
Journey = TypeVar("Journey")


class RunExperts(Protocol):
    """rows (R, h), expert by expert → their outputs (R, h), multiplied by `weights` (R,) where these are given."""

    def __call__(self, rows: Tensor, groups: Groups, weights: Tensor | None) -> Tensor: ...


class Dispatcher(Protocol):
    """Runs the experts of x (n, h) and `beside`, whose compute may hide the communication.

    Returns:
        The weighted sum of the experts' outputs (n, h), and what `beside` returned.
    """

    rows: RowKernels
    """What moves and sorts rows; replaceable from outside."""

    @property
    def fixed_width(self) -> bool:
        """Whether the experts per token have to be equally many in all calls of a step, on whatever rank."""
        ...

    def __call__(
        self, x: Tensor, routing: Routing, experts: RunExperts, beside: Callable[[], T]
    ) -> tuple[Tensor, T]: ...


@dataclass(frozen=True)
class Arrived:
    """What the experts of a rank compute: rows (R, h), how many each has, and weights (R,) to be multiplied in."""

    rows: Tensor
    groups: Groups
    weights: Tensor | None


class Phases(Generic[Journey]):
    """The order of the phases. A journey is what one chunk of rows carries from phase to phase."""

    fixed_width = True

    def __init__(self) -> None:
        self.rows = RowKernels()

    def __call__(self, x: Tensor, routing: Routing, experts: RunExperts, beside: Callable[[], T]) -> tuple[Tensor, T]:
        journeys = self.prepare(x, routing)
        for journey in journeys:
            self.dispatch(journey)
        other = beside()
        for journey in journeys:
            arrived = self.arrange(journey)
            self.collect(journey, experts(arrived.rows, arrived.groups, arrived.weights))
            self.combine(journey)
        return self.finish(journeys, routing), other

    def prepare(self, x: Tensor, routing: Routing) -> list[Journey]:
        """Decides who gets which rows of x (n, h)."""
        raise NotImplementedError

    def dispatch(self, journey: Journey) -> None:
        """Starts the way there."""
        raise NotImplementedError

    def arrange(self, journey: Journey) -> Arrived:
        """Waits for the rows."""
        raise NotImplementedError

    def collect(self, journey: Journey, out: Tensor) -> None:
        """Takes the experts' outputs (R, h)."""
        raise NotImplementedError

    def combine(self, journey: Journey) -> None:
        """Starts the way back."""
        raise NotImplementedError

    def finish(self, journeys: list[Journey], routing: Routing) -> Tensor:
        """Waits for the results, gives (n, h)."""
        raise NotImplementedError


@dataclass
class _ChunkRows:
    """One chunk's rows, wherever they are now."""

    chunk: Chunk
    there: AsyncAllToAll
    back: AsyncAllToAll
    rows: Tensor
    weights: Tensor | None
    weights_there: AsyncAllToAll


class AllToAll(Phases[_ChunkRows]):
    """Every token travels to each of its experts' ranks.

    Without a capacity nothing is dropped here and the ranks tell each other how many rows come; with one
    (`Routing.capacity`) every expert gets exactly so many rows from every rank, and all shapes are known.

    Args:
        experts: of the whole layer.
        ep: the ranks that share the experts.
        etp: the ranks that share each expert's inner width.
        weigh_before: the weights are multiplied before the experts' second matrix, so they travel along.
    """

    def __init__(self, experts: int, ep: Axis, etp: Axis, *, weigh_before: bool = False) -> None:
        super().__init__()
        self.experts, self.ep, self.etp, self.weigh_before = experts, ep, etp, weigh_before
        self.fixed_width = False
        self.chunks = 1
        """Rows travel in so many parts, each behind the compute of another one; may change between steps."""

    def prepare(self, x: Tensor, routing: Routing) -> list[_ChunkRows]:
        plan = self._plan(routing)
        n, k = routing.experts.shape
        rows = self.rows.spread(x, plan.pairs // k, plan.places)
        parts = _split(rows, plan.chunks)
        weights: list[Tensor] | list[None] = [None] * len(parts)
        if self.weigh_before:
            column = routing.weights.reshape(n * k, 1)
            weights = _split(self.rows.spread(column, plan.pairs, plan.places.view(n * k, 1)), plan.chunks)
        return [
            _ChunkRows(
                chunk,
                AsyncAllToAll(self.ep, chunk.send, chunk.receive),
                AsyncAllToAll(self.ep, chunk.receive, chunk.send),
                part,
                weight,
                AsyncAllToAll(self.ep, chunk.send, chunk.receive),
            )
            for chunk, part, weight in zip(plan.chunks, parts, weights, strict=True)
        ]

    def dispatch(self, journey: _ChunkRows) -> None:
        journey.rows = journey.there.start(journey.rows)
        if journey.weights is not None:
            journey.weights = journey.weights_there.start(journey.weights)

    def arrange(self, journey: _ChunkRows) -> Arrived:
        rows = self._arrange(journey.there.finish(journey.rows), journey.chunk)
        weights = journey.weights
        if weights is not None:
            weights = self._arrange(journey.weights_there.finish(weights), journey.chunk).view(-1)
        return Arrived(rows, journey.chunk.groups, weights)

    def collect(self, journey: _ChunkRows, out: Tensor) -> None:
        chunk = journey.chunk
        if chunk.block is not None:
            sources, experts, width = chunk.block
            out = _swap(out, experts, sources, width)
        elif chunk.order is not None:
            out = permute.reorder(out, chunk.order.inverse, chunk.order.index)
        journey.rows = scatter_rows(out, self.etp, chunk.gathered)

    def combine(self, journey: _ChunkRows) -> None:
        journey.rows = journey.back.start(journey.rows)

    def finish(self, journeys: list[_ChunkRows], routing: Routing) -> Tensor:
        parts = [journey.back.finish(journey.rows) for journey in journeys]
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        plan, weights = self._plan(routing), None if self.weigh_before else routing.weights
        return self.rows.combine(rows, plan.places, weights, padded=routing.capacity is not None)

    def _plan(self, routing: Routing) -> RowPlan:
        """The plan, made once for a routing, also when a layer runs again."""
        plans = routing.findings.plans
        if self.chunks not in plans:
            ids, capacity, where = routing.experts, routing.capacity, (self.experts, self.ep, self.etp, self.chunks)
            if capacity is None:
                plans[self.chunks] = by_count(ids, *where, self.rows.sort)
            else:
                plans[self.chunks] = by_capacity(ids, capacity, *where)
        return plans[self.chunks]

    def _arrange(self, rows: Tensor, chunk: Chunk) -> Tensor:
        rows = gather_rows(rows, self.etp, chunk.gathered)
        if chunk.block is not None:
            return _swap(rows, *chunk.block)
        return rows if chunk.order is None else permute.reorder(rows, chunk.order.index, chunk.order.inverse)


def _split(rows: Tensor, chunks: tuple[Chunk, ...]) -> list[Tensor]:
    return list(rows.split([chunk.rows for chunk in chunks])) if len(chunks) > 1 else [rows]


def _swap(rows: Tensor, outer: int, inner: int, width: int) -> Tensor:
    """(outer · inner · width, h) → (inner · outer · width, h)."""
    if outer == 1 or inner == 1:
        return rows
    return rows.view(outer, inner, width, rows.shape[1]).transpose(0, 1).reshape(rows.shape)
