"""Rows on their way between ranks, forward and backward, behind other compute.

A journey over ep is a pair of autograd functions. `start` launches the collective and hands on the tensor that it
fills; `finish` waits. In backward `finish` launches the collective the other way and `start` waits for it, so that
whatever was computed between the two hides the communication in both directions:

    forward    start ─── beside ─── finish          backward    finish ─── beside ─── start
                 └── rows travel ──────┘                          └── gradients travel ──┘

A layer that runs again for its backward stops at the last tensor that it saves. Nothing is in flight then, as what
`finish` gave is used by something that saves: the experts, and the weighted sum of their results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..comm.collectives import Handle, all_gather, all_to_all, reduce_scatter
from ..comm.mesh import Axis
from ..comm.shared_memory_collectives import sum_in_rank_order


class AsyncAllToAll:
    """One journey of rows from all ranks of an axis to all of them.

    Args:
        axis: the ranks.
        send, receive: rows to and from each.
    """

    def __init__(self, axis: Axis, send: list[int], receive: list[int]) -> None:
        self.axis, self.send, self.receive = axis, send, receive
        self._handle: Handle | None = None

    def start(self, x: Tensor) -> Tensor:
        """x (rows, …) leaves; the result may be used after `finish` only."""
        return x if self.axis.size == 1 else _Start.apply(x, self)

    def finish(self, flying: Tensor) -> Tensor:
        """What `start` returned, arrived: (rows received, …) by rank."""
        return flying if self.axis.size == 1 else _Finish.apply(flying, self)

    def launch(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Starts the collective of x (rows sent, …); returns what it fills, (rows received, …)."""
        out = x.new_empty((sum(receive), *x.shape[1:]))
        self._handle = all_to_all(x, self.axis, send, receive, out)
        return out

    def land(self) -> Tensor:
        """Waits for what `launch` returned, (rows received, …); nothing of the collective is kept."""
        assert self._handle is not None
        handle, self._handle = self._handle, None
        return handle.wait()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flight: AsyncAllToAll) -> Tensor:
        ctx.flight = flight
        return flight.launch(x, flight.send, flight.receive)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.flight.land(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flying: Tensor, flight: AsyncAllToAll) -> Tensor:
        flight.land()
        ctx.flight = flight
        return flying.view_as(flying)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        flight: AsyncAllToAll = ctx.flight
        flight.launch(grad.contiguous(), flight.receive, flight.send)
        return grad, None  # `start` gets the gradient of its input from the collective


def gather_rows(x: Tensor, axis: Axis, counts: list[int]) -> Tensor:
    """x (counts[rank], …) → all ranks' rows (sum of counts, …) in rank order; in backward gradients are summed."""
    return x if axis.size == 1 else _GatherRows.apply(x, axis, counts)


def scatter_rows(x: Tensor, axis: Axis, counts: list[int]) -> Tensor:
    """x (sum of counts, …) → (counts[rank], …): the sum over ranks, in their order, of this rank's part."""
    return x if axis.size == 1 else _ScatterRows.apply(x, axis, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, counts: list[int]) -> Tensor:
        ctx.axis, ctx.counts = axis, counts
        return _gather(x, axis, counts)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _scatter(grad, ctx.axis, ctx.counts), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, counts: list[int]) -> Tensor:
        ctx.axis, ctx.counts = axis, counts
        return _scatter(x, axis, counts)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(grad, ctx.axis, ctx.counts), None, None


def _even(counts: list[int]) -> bool:
    return min(counts) == max(counts)


def _gather(x: Tensor, axis: Axis, counts: list[int]) -> Tensor:
    if _even(counts):
        return all_gather(x, axis).wait()
    copies = x.expand(axis.size, *x.shape).reshape(-1, *x.shape[1:])
    return all_to_all(copies, axis, [len(x)] * axis.size, counts).wait()


def _scatter(x: Tensor, axis: Axis, counts: list[int]) -> Tensor:
    if _even(counts):
        return reduce_scatter(x, axis).wait()
    mine = counts[axis.rank]
    parts = all_to_all(x, axis, counts, [mine] * axis.size).wait().view(axis.size, mine, *x.shape[1:])
    return sum_in_rank_order(parts, torch.empty_like(parts[0]))
