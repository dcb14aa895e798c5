"""Which row goes where: the index arithmetic of dispatchers, without loops over rows.

Rows leave a rank chunk by chunk, within a chunk expert by expert, within an expert in the order of the tokens. They
arrive source by source and are brought into the order of the experts:

    leaves (on each source)   │ chunk 0: expert 0 │ 1 │ 2 │ 3 ‖ chunk 1: expert 0 │ 1 │ …
    arrives (rank of 2, 3)    │ source 0: expert 2 │ 3 │ source 1: expert 2 │ 3 │
    computes                  │ expert 2: source 0 │ 1 │ expert 3: source 0 │ 1 │
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..comm.collectives import all_gather, all_to_all
from ..comm.mesh import Axis
from ..grouped_projection import Groups
from ..kernels.upload import upload


@dataclass(frozen=True)
class Order:
    """A permutation of rows and its inverse."""

    index: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Chunk:
    """The journey of one chunk's rows; numbers of rows are the host's.

    Args:
        send: to each rank of ep.
        receive: from each rank of ep.
        gathered: of each rank of etp, which together are what the experts compute.
        groups: of each expert of this rank.
        order: from the order of arrival to that of the experts; none: they are the same.
        block: (sources, experts, rows of each), where all experts get the same number from every source.
    """

    send: list[int]
    receive: list[int]
    gathered: list[int]
    groups: Groups
    order: Order | None = None
    block: tuple[int, int, int] | None = None

    @property
    def rows(self) -> int:
        """How many leave this rank."""
        return sum(self.send)


@dataclass(frozen=True)
class RowPlan:
    """The journey of all rows.

    Args:
        pairs: (R,) which assignment, token · K + k, each leaving row is; rows of padding repeat one.
        places: (n, K) the leaving row of each assignment, or -1.
        chunks: one after another.
    """

    pairs: Tensor
    places: Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Assignments:
    """(R,) which of all ranks' assignments are this rank's, by expert and then by source, and how many each has."""

    pairs: Tensor
    groups: Groups


class SortByExpert(Protocol):
    """As `sort_by_expert`."""

    def __call__(self, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]: ...


def sort_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments in the order of their experts, those of an expert in the order of the tokens.

    Args:
        ids: (n, K) experts, or -1: nowhere, which stand behind the others.
        experts: of the whole layer.

    Returns:
        (n · K) which assignment stands in each row; (n, K) the row of each, -1 for those to nowhere; (E,) int32, the
        last row + 1 of each expert.
    """
    order, edges = _sorted(ids, experts, [len(ids)])
    return order, _places(order, ids).masked_fill(ids < 0, -1), edges[1 : experts + 1].int()


def by_count(
    ids: Tensor, experts: int, ep: Axis, etp: Axis, chunks: int, sort: SortByExpert = sort_by_expert
) -> RowPlan:
    """Every assignment is a row. The ranks exchange how many they have; one copy from the device to the host.

    Args:
        ids: (n, K) experts of each token, or -1.
        experts: of the whole layer.
        ep, etp: the expert mesh.
        chunks: runs of tokens that travel one after another.
    """
    if ids.is_cuda and ep.size == etp.size == chunks == 1:
        return _on_one_device(ids, experts, sort)
    n, k = ids.shape
    sizes = [n * (i + 1) // chunks - n * i // chunks for i in range(chunks)]
    places = None
    if chunks == 1:
        order, places, ends = sort(ids, experts)
        counts = F.pad(ends.long(), (1, 0)).diff().unsqueeze(0)
    else:
        order, edges = _sorted(ids, experts, sizes)
        counts = edges.diff().view(chunks, experts + 1)[:, :experts]
    per_rank = counts.reshape(chunks, ep.size, -1).transpose(0, 1).contiguous()
    arriving = all_to_all(per_rank, ep).wait()  # (source, chunk, expert)
    everyone = all_gather(arriving, etp).wait().view(etp.size, ep.size, chunks, -1)
    numbers = torch.cat(
        (
            per_rank.sum(2).t().reshape(-1),
            arriving.sum(2).t().reshape(-1),
            everyone.sum((1, 3)).t().reshape(-1),
            everyone.sum((0, 1)).reshape(-1),
        )
    )
    host = iter(numbers.tolist())

    def take(width: int) -> list[list[int]]:
        return [[next(host) for _ in range(width)] for _ in range(chunks)]

    send, receive, gathered, groups = take(ep.size), take(ep.size), take(etp.size), take(experts // ep.size)
    journeys = tuple(
        Chunk(send[i], receive[i], gathered[i], Groups(tuple(groups[i])), major(everyone[:, :, i], sum(groups[i])))
        for i in range(chunks)
    )
    starts = [sum(sizes[:i]) * k for i in range(chunks)]
    pairs = torch.cat([order[start : start + c.rows] for start, c in zip(starts, journeys, strict=True)])
    return RowPlan(pairs, _places(pairs, ids) if places is None else places, journeys)


def _on_one_device(ids: Tensor, experts: int, sort: SortByExpert = sort_by_expert) -> RowPlan:
    """The same where nobody else has to know how many rows there are, nor the host, which need not wait for them.

    Assignments to nowhere have rows too, behind those of the experts; nobody reads what is made of them.
    """
    order, places, ends = sort(ids, experts)
    rows = [ids.numel()]
    ends[-1:].clamp_(min=min(1, ids.numel()))  # the first row, which places of nowhere are read as, is somebody's
    groups = Groups.on_device(ends, ids.numel())
    return RowPlan(order, places, (Chunk(rows, rows, rows, groups),))


def at_home(ids: Tensor, counts: list[int]) -> RowPlan:
    """Rows that have arrived: ids (n, K) of this rank's experts, or -1, of which the host knows the numbers."""
    order, _ = _sorted(ids, len(counts), [ids.shape[0]])
    pairs, rows = order[: sum(counts)], [sum(counts)]
    return RowPlan(pairs, _places(pairs, ids), (Chunk(rows, rows, rows, Groups(tuple(counts))),))


def by_capacity(ids: Tensor, capacity: int, experts: int, ep: Axis, etp: Axis, chunks: int) -> RowPlan:
    """Every expert gets `capacity` rows of this rank's, so that nothing depends on the data: no exchange, no copy.

    Args:
        ids: (n, K) experts of each token, or -1; what exceeds the capacity goes nowhere.
        capacity: of an expert for this rank's tokens.
        experts: of the whole layer.
        ep, etp: the expert mesh.
        chunks: runs of each expert's rows that travel one after another (Tutel, arXiv 2206.03382, section 3.3).
    """
    (n, k), device = ids.shape, ids.device
    order, edges = _sorted(ids, experts, [n])
    key = ids.reshape(-1).index_select(0, order)
    position = torch.arange(n * k, device=device) - edges.index_select(0, key.clamp(min=0))
    bounds = [capacity * i // chunks for i in range(chunks + 1)]
    # Row = base[position] + expert · stride[position]: each chunk is a block of its own.
    spans = [(low, high - low) for low, high in pairwise(bounds)]
    base = [(experts - 1) * low + c for low, width in spans for c in range(low, low + width)]
    stride = [width for _, width in spans for _ in range(width)]
    table = upload(torch.tensor([base, stride]), device)
    fits = (key >= 0) & (position < capacity)
    at = position.clamp(max=capacity - 1)
    row = torch.where(fits, table[0].index_select(0, at) + key * table[1].index_select(0, at), -1)
    places = torch.empty_like(order).scatter_(0, order, row)
    # What has no row is written behind the last one.
    pairs = order.new_zeros(experts * capacity + 1).scatter_(0, torch.where(fits, row, experts * capacity), order)
    mine, sources = experts // ep.size, ep.size * etp.size
    journeys = tuple(
        Chunk(
            [mine * width] * ep.size,
            [mine * width] * ep.size,
            [experts * width] * etp.size,
            Groups((sources * width,) * mine),
            block=(sources, mine, width),
        )
        for _, width in spans
    )
    return RowPlan(pairs[:-1], places.view(n, k), journeys)


def _sorted(ids: Tensor, experts: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Assignments (n · K) by (chunk, expert, token), those to nowhere at the end of their chunk; first of each run."""
    width = experts + 1
    keys = torch.where(ids < 0, experts, ids)
    if len(sizes) > 1:
        chunk = torch.repeat_interleave(
            torch.arange(len(sizes), device=ids.device),
            upload(torch.tensor(sizes), ids.device),
            output_size=ids.shape[0],
        )
        keys = keys + chunk.unsqueeze(1) * width
    ordered, order = torch.sort(keys.reshape(-1), stable=True)
    runs = torch.arange(len(sizes) * width + 1, device=ids.device)
    return order, torch.searchsorted(ordered, runs)


def _places(pairs: Tensor, ids: Tensor) -> Tensor:
    places = torch.full_like(ids, -1).view(-1)
    places[pairs] = torch.arange(len(pairs), device=ids.device)
    return places.view_as(ids)


def major(counts: Tensor, rows: int) -> Order | None:
    """From rows by (source, expert) to rows by (expert, source).

    Args:
        counts: (…, experts) rows from each source.
        rows: their sum.
    """
    counts = counts.reshape(-1, counts.shape[-1])
    if 1 in counts.shape:
        return None
    flat = counts.reshape(-1)
    starts = (torch.cumsum(flat, 0) - flat).view_as(counts).t().reshape(-1)
    runs = counts.t().reshape(-1)
    shift = starts - (torch.cumsum(runs, 0) - runs)
    places = torch.arange(rows, device=counts.device)
    index = places + torch.repeat_interleave(shift, runs, output_size=rows)
    return Order(index, torch.empty_like(index).scatter_(0, index, places))
