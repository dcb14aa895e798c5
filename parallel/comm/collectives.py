"""Every collective and transfer of the project: named axis, recorded, launched asynchronously, with one abortable wait.

Each call returns a `Handle`; `handle.wait()` gives the result. Autograd forms stand at the end of the file. All
tensors are contiguous and split along dim 0.

Between CPU processes of one host they copy from memory to memory (`local_collectives.py`), elsewhere torch runs them.
On gloo a gather or scatter is an all-to-all: its all_gather takes 2 to 3 times as long as an all-to-all with the input
repeated for every peer, its reduce_scatter three times as long as one followed by a local sum, and its all_reduce pays
the same. The sum runs in rank order, so that every rank gets the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from . import shared_memory_collectives as local
from .mesh import Axis
from .shared_memory_collectives import Flight, sum_in_rank_order
from .slow_copies import record_copies
from .waiting import Abort, Transfer, Waiter

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed them.
_torch_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_torch_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_RING_FROM_BYTES = 1 << 16
"""Below this gloo's own all_reduce, one round trip, is faster than two steps."""


class Handle:
    """A collective or transfer in flight."""

    def __init__(
        self, result: Tensor, finish: Callable[[], Tensor] | None = None, test: Callable[[], bool] | None = None
    ) -> None:
        self._result, self._finish, self._test = result, finish, test

    @staticmethod
    def after(result: Tensor, *waits: Callable[[], object], test: Callable[[], bool] | None = None) -> Handle:
        """The handle of `result` (…), which is complete once `waits`, called in their order, have returned."""

        def finish() -> Tensor:
            for wait in waits:
                wait()
            return result

        return Handle(result, finish, test)

    def done(self) -> bool:
        """Whether it is complete, without waiting. A collective knows only after `wait`, a transfer before."""
        return self._finish is None or (self._test is not None and self._test())

    def wait(self) -> Tensor:
        """The result, of the shape that the collective names, complete (on CUDA: for work enqueued after this call).

        Raises:
            Aborted, Overdue: see `waiting.Abort.wait`.
        """
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
            self._test = None  # or it would keep the exchange
        return self._result


def _enter(kind: str, axis: Axis, x: Tensor, peer: int = -1) -> int:
    """Opens an entry of the record; returns its ticket."""
    recorder = axis.recorder
    if recorder is None:
        return -1
    return recorder.enter(
        recorder.intern(kind),
        axis=axis.code,
        group=axis.ranks[0],
        peer=peer,
        dtype=recorder.intern(str(x.dtype)),
        nbytes=x.numel() * x.element_size(),
        seq=axis.number(kind, peer),
    )


def _launch(kind: str, axis: Axis, x: Tensor, start: Callable[[], dist.Work | None]) -> Callable[[], None]:
    """Starts one torch collective, records it, and returns the function that waits for it."""
    recorder = axis.recorder
    ticket = _enter(kind, axis, x)
    work = start()
    if work is None:
        raise RuntimeError(f"{kind} over {axis.name}: this rank is not in the group")
    if x.is_cuda:
        return partial(_wait_cuda, work, axis, ticket)
    done = threading.Event()

    def completed(_: object) -> None:
        if recorder is not None:
            recorder.exit(ticket)
        done.set()

    work.get_future().add_done_callback(completed)
    return partial(_wait_host, work, axis, done, kind, ticket)


def _wait_host(work: dist.Work, axis: Axis, done: threading.Event, kind: str, ticket: int) -> None:
    if axis.recorder is not None:
        axis.recorder.waits(ticket)
    if axis.abort is not None:
        axis.abort.wait(done, f"{kind} over {axis.name}")
    work.wait()


def _wait_cuda(work: dist.Work, axis: Axis, ticket: int) -> None:
    _begin_wait(axis, ticket)
    work.wait()  # makes the current stream wait; the host goes on
    _end_wait(axis, ticket)


def _begin_wait(axis: Axis, ticket: int) -> None:
    """The rank has nothing else to do from here on; on a device it is the stream that waits."""
    if axis.recorder is not None:
        axis.recorder.waits(ticket)
        if axis.recorder.device is not None:
            axis.recorder.device.begin(ticket, waited=True)


def _end_wait(axis: Axis, ticket: int) -> None:
    if axis.recorder is not None:
        if axis.recorder.device is not None:
            axis.recorder.device.end(ticket)
        axis.recorder.exit(ticket)


def _copied(kind: str, axis: Axis, x: Tensor, start: Callable[[], Flight], peer: int = -1) -> Handle:
    """Starts a collective between the memories of one host, and records it; x is its tensor in the record."""
    ticket = _enter(kind, axis, x, peer)
    flight = start()

    def finish() -> Tensor:
        if axis.recorder is not None:
            axis.recorder.waits(ticket)
        result = flight.finish()
        _exit(axis, ticket, flight)
        return result

    def done() -> bool:
        if landed := flight.done():
            _exit(axis, ticket, flight)
        return landed

    return Handle(x, finish, done)


def _exit(axis: Axis, ticket: int, flight: Flight | None = None) -> None:
    """Closes an entry of the record; a flight tells when its last rank came, and which of its copies took long."""
    if axis.recorder is not None:
        axis.recorder.exit(ticket, arrived=flight.arrived() if flight is not None else 0)
        if flight is not None:
            record_copies(axis.recorder, axis.code, axis.ranks[0], flight.slow())


def _gloo(x: Tensor) -> bool:
    return not x.is_cuda


def all_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """(n, …) on each rank → (size · n, …), in rank order."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    result = out if out is not None else x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    if axis.local is not None:
        return _copied("all_gather", axis, result, partial(local.all_gather, axis.local, x, result))
    if _gloo(x):
        copies = x.expand(axis.size, *x.shape).reshape(result.shape).contiguous()
        wait = _launch(
            "all_gather",
            axis,
            result,
            lambda: dist.all_to_all_single(result, copies, group=axis.group, async_op=True),
        )
    else:
        wait = _launch(
            "all_gather",
            axis,
            result,
            lambda: _torch_all_gather(result, x, group=axis.group, async_op=True),
        )
    return Handle.after(result, wait)


def reduce_scatter(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """(size · n, …) on each rank → (n, …): rank r's is the sum over ranks of their r-th part."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    result = out if out is not None else x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    if axis.local is not None:
        return _copied("reduce_scatter", axis, x, partial(local.reduce_scatter, axis.local, x, result))
    if not _gloo(x):
        wait = _launch(
            "reduce_scatter",
            axis,
            x,
            lambda: _torch_reduce_scatter(result, x, group=axis.group, async_op=True),
        )
        return Handle.after(result, wait)
    parts = torch.empty_like(x)
    wait = _launch("reduce_scatter", axis, x, lambda: dist.all_to_all_single(parts, x, group=axis.group, async_op=True))

    def finish() -> Tensor:
        wait()
        return sum_in_rank_order(parts.view(axis.size, *result.shape), result)

    return Handle(result, finish)


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Handle:
    """In place: x becomes the sum (or max, min) over the axis."""
    if axis.size == 1:
        return Handle(x)
    large = x.nbytes >= _RING_FROM_BYTES and x.numel() % axis.size == 0
    in_two = op == "sum" and large and x.is_contiguous()
    if axis.local is not None:
        start = partial(local.all_reduce_in_two, axis.local, x) if in_two else None
        return _copied("all_reduce", axis, x, start or partial(local.all_reduce, axis.local, x, op))
    if _gloo(x) and in_two:
        flat = x.view(-1)
        scattered = reduce_scatter(flat, axis)
        return Handle.after(x, lambda: all_gather(scattered.wait(), axis, out=flat).wait())
    wait = _launch("all_reduce", axis, x, lambda: dist.all_reduce(x, _OPS[op], group=axis.group, async_op=True))
    return Handle.after(x, wait)


def all_to_all(
    x: Tensor, axis: Axis, send: list[int] | None = None, receive: list[int] | None = None, out: Tensor | None = None
) -> Handle:
    """Part i of x (rows, …) goes to rank i → (rows received, …), by rank.

    `send` and `receive` are rows per rank; none: equal parts.
    """
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    rows = sum(receive) if receive is not None else x.shape[0]
    result = out if out is not None else x.new_empty((rows, *x.shape[1:]))
    if axis.local is not None:
        return _copied("all_to_all", axis, x, partial(local.all_to_all, axis.local, x, result, send, receive))
    wait = _launch(
        "all_to_all",
        axis,
        x,
        lambda: dist.all_to_all_single(result, x, receive, send, group=axis.group, async_op=True),
    )
    return Handle.after(result, wait)


def broadcast(x: Tensor, axis: Axis, source: int) -> Handle:
    """In place: x (…) becomes that of the rank at index `source` of the axis."""
    if axis.size == 1:
        return Handle(x)
    if axis.local is not None:
        return _copied("broadcast", axis, x, partial(local.broadcast, axis.local, x, source))
    root = axis.ranks[source]
    wait = _launch("broadcast", axis, x, lambda: dist.broadcast(x, root, group=axis.group, async_op=True))
    return Handle.after(x, wait)


def broadcast_blocks(x: Tensor, axis: Axis, sources: Sequence[int]) -> Handle:
    """In place: block j of x (len(sources) · n, …) becomes that of the rank at index `sources[j]` of the axis."""
    handles = [broadcast(part, axis, source) for part, source in zip(x.chunk(len(sources)), sources, strict=True)]
    return Handle.after(x, *(handle.wait for handle in handles))


def reduce(x: Tensor, axis: Axis, to: int) -> Handle:
    """Sum of x (n, …) over the axis → (n, …) on the rank at index `to`, (0, …) on the others. x is spent."""
    return reduce_blocks(x, axis, (to,))


def reduce_blocks(x: Tensor, axis: Axis, to: Sequence[int]) -> Handle:
    """Sums each block of x to one rank; x is spent.

    gloo's own reduce takes up to twice as long as gathering and adding in rank order (8 ranks, 1 to 4 MiB).

    Args:
        x: (len(to) · n, …), equal blocks.
        axis: over which to sum.
        to: ascending indices; the rank at index `to[j]` gets the sum of all ranks' block j.

    Returns:
        (n, …) on these ranks, (0, …) on the others.
    """
    if axis.size == 1:
        return Handle(x)
    x = x.contiguous()
    if axis.local is not None:
        return _copied("reduce", axis, x, partial(local.reduce_blocks, axis.local, x, to))
    blocks, block = x.chunk(len(to)), x.shape[0] // len(to)
    mine = to.index(axis.rank) if axis.rank in to else None
    if not _gloo(x):
        waits = [
            _launch("reduce", axis, part, partial(_torch_reduce, part, axis.ranks[index], axis))
            for part, index in zip(blocks, to, strict=True)
        ]
        result = x[:0] if mine is None else blocks[mine]
        return Handle.after(result, *waits)
    rows = block if mine is not None else 0
    parts = x.new_empty((axis.size * rows, *x.shape[1:]))
    send = [block if index in to else 0 for index in range(axis.size)]
    receive = [rows] * axis.size
    wait = _launch(
        "reduce",
        axis,
        x,
        lambda: dist.all_to_all_single(parts, x, receive, send, group=axis.group, async_op=True),
    )

    def finish() -> Tensor:
        wait()
        if mine is None:
            return parts
        return sum_in_rank_order(parts.view(axis.size, block, *x.shape[1:]), torch.empty_like(parts[:block]))

    return Handle(parts, finish)


def _torch_reduce(x: Tensor, to: int, axis: Axis) -> dist.Work | None:
    return dist.reduce(x, to, group=axis.group, async_op=True)


def send(x: Tensor, axis: Axis, to: int) -> Handle:
    """Sends x (…) to the rank at index `to` of the axis; x must not change until the handle is done.

    Sends from one rank to another are received in their order. On NCCL the two directions between two ranks need an
    axis each: `Mesh.channel`.
    """
    x = x.contiguous()
    if axis.local is not None:
        return _copied("send", axis, x, partial(local.send, axis.local, x, to), axis.ranks[to])
    return _transfer("send", x, axis, to, lambda: dist.isend(x, axis.ranks[to], group=axis.group))


def receive(out: Tensor, axis: Axis, source: int) -> Handle:
    """Receives into `out` (…), contiguous, what the rank at index `source` of the axis sends of the same shape."""
    if not out.is_contiguous():
        raise ValueError("a tensor is received into contiguous memory")
    if axis.local is not None:
        return _copied("receive", axis, out, partial(local.receive, axis.local, out, source), axis.ranks[source])
    return _transfer("receive", out, axis, source, lambda: dist.irecv(out, axis.ranks[source], group=axis.group))


def _transfer(kind: str, x: Tensor, axis: Axis, peer: int, start: Callable[[], dist.Work | None]) -> Handle:
    ticket = _enter(kind, axis, x, axis.ranks[peer])
    work = start()
    if work is None:
        raise RuntimeError(f"{kind} over {axis.name}: this rank is not in the group")
    waits = partial(_begin_wait, axis, ticket)
    if x.is_cuda:
        return Handle.after(x, waits, work.wait, partial(_end_wait, axis, ticket), test=work.is_completed)
    waiter = axis.waiters.get((kind, peer))
    if waiter is None:
        waiter = axis.waiters[kind, peer] = Waiter(f"{kind} {axis.name}")
    transfer = Transfer(work, partial(_exit, axis, ticket))
    waiter.add(transfer)
    abort, what = axis.abort or Abort(), f"{kind} over {axis.name}"
    return Handle.after(x, waits, partial(transfer.wait, abort, what), test=transfer.done)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis).wait()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return reduce_scatter(grad, ctx.axis).wait(), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis).wait()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_gather(grad, ctx.axis).wait(), None


def all_gather_autograd(x: Tensor, axis: Axis) -> Tensor:
    """(n, …) of each rank → (size · n, …): `all_gather` whose backward is `reduce_scatter`."""
    return x if axis.size == 1 else _AllGather.apply(x, axis)


def reduce_scatter_autograd(x: Tensor, axis: Axis) -> Tensor:
    """(size · n, …) of each rank → (n, …): `reduce_scatter` whose backward is `all_gather`."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis)
