"""Every collective of the project: named axis, recorded, launched asynchronously, with one abortable wait.

Each call returns a `Handle`; `handle.wait()` gives the result. Autograd forms stand at the end of the file. All
tensors are contiguous and split along dim 0.

On gloo a gather or scatter is an all-to-all: its all_gather takes 2 to 3 times as long as an all-to-all with the input
repeated for every peer, its reduce_scatter three times as long as one followed by a local sum, and its all_reduce pays
the same. The sum runs in rank order, so that every rank gets the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed them.
_torch_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_torch_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_RING_FROM_BYTES = 1 << 16
"""Below this gloo's own all_reduce, one round trip, is faster than two steps."""


class Handle:
    """A collective in flight."""

    def __init__(self, result: Tensor, finish: Callable[[], Tensor] | None = None) -> None:
        self._result, self._finish = result, finish

    def wait(self) -> Tensor:
        """The result, complete (on CUDA: complete for work enqueued after this call).

        Raises:
            Aborted, TimeoutError: see `waiting.Abort.wait`.
        """
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        return self._result


def _launch(kind: str, axis: Axis, x: Tensor, start: Callable[[], dist.Work | None]) -> Callable[[], None]:
    """Starts one torch collective, records it, and returns the function that waits for it."""
    recorder = axis.recorder
    ticket = -1
    if recorder is not None:
        ticket = recorder.enter(
            recorder.intern(kind),
            axis=axis.code,
            group=axis.ranks[0],
            dtype=recorder.intern(str(x.dtype)),
            nbytes=x.numel() * x.element_size(),
            seq=next(axis.sequence),
        )
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
    return partial(_wait_host, work, axis, done, kind)


def _wait_host(work: dist.Work, axis: Axis, done: threading.Event, kind: str) -> None:
    if axis.abort is not None:
        axis.abort.wait(done, f"{kind} over {axis.name}")
    work.wait()


def _wait_cuda(work: dist.Work, axis: Axis, ticket: int) -> None:
    work.wait()  # makes the current stream wait; the host goes on
    if axis.recorder is not None:
        axis.recorder.exit(ticket)


def _gloo(x: Tensor) -> bool:
    return not x.is_cuda


def all_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """(n, …) on each rank → (size · n, …), in rank order."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    result = out if out is not None else x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    if _gloo(x):
        copies = x.expand(axis.size, *x.shape).reshape(result.shape)
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
    return Handle(result, lambda: (wait(), result)[1])


def reduce_scatter(x: Tensor, axis: Axis, out: Tensor | None = None) -> Handle:
    """(size · n, …) on each rank → (n, …): rank r's is the sum over ranks of their r-th part."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    result = out if out is not None else x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    if not _gloo(x):
        wait = _launch(
            "reduce_scatter",
            axis,
            x,
            lambda: _torch_reduce_scatter(result, x, group=axis.group, async_op=True),
        )
        return Handle(result, lambda: (wait(), result)[1])
    parts = torch.empty_like(x)
    wait = _launch("reduce_scatter", axis, x, lambda: dist.all_to_all_single(parts, x, group=axis.group, async_op=True))

    def finish() -> Tensor:
        wait()
        return _sum_in_rank_order(parts.view(axis.size, *result.shape), result)

    return Handle(result, finish)


def _sum_in_rank_order(parts: Tensor, out: Tensor) -> Tensor:
    """parts (size, n, …) → out (n, …). bf16 is summed in fp32."""
    if parts.shape[0] == 2:
        return torch.add(parts[0], parts[1], out=out)
    return torch.sum(parts, dim=0, out=out)


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Handle:
    """In place: x becomes the sum (or max, min) over the axis."""
    if axis.size == 1:
        return Handle(x)
    large = x.numel() * x.element_size() >= _RING_FROM_BYTES and x.numel() % axis.size == 0
    if _gloo(x) and op == "sum" and large and x.is_contiguous():
        flat = x.view(-1)
        scattered = reduce_scatter(flat, axis)
        return Handle(x, lambda: (all_gather(scattered.wait(), axis, out=flat).wait(), x)[1])
    wait = _launch("all_reduce", axis, x, lambda: dist.all_reduce(x, _OPS[op], group=axis.group, async_op=True))
    return Handle(x, lambda: (wait(), x)[1])


def all_to_all(
    x: Tensor, axis: Axis, send: list[int] | None = None, receive: list[int] | None = None, out: Tensor | None = None
) -> Handle:
    """Part i of x goes to rank i. `send` and `receive` are rows per rank; none: equal parts."""
    if axis.size == 1:
        return Handle(x if out is None else out.copy_(x))
    x = x.contiguous()
    rows = sum(receive) if receive is not None else x.shape[0]
    result = out if out is not None else x.new_empty((rows, *x.shape[1:]))
    wait = _launch(
        "all_to_all",
        axis,
        x,
        lambda: dist.all_to_all_single(result, x, receive, send, group=axis.group, async_op=True),
    )
    return Handle(result, lambda: (wait(), result)[1])


def broadcast(x: Tensor, axis: Axis, source: int) -> Handle:
    """In place: x becomes that of the rank at index `source` of the axis."""
    if axis.size == 1:
        return Handle(x)
    root = axis.ranks[source]
    wait = _launch("broadcast", axis, x, lambda: dist.broadcast(x, root, group=axis.group, async_op=True))
    return Handle(x, lambda: (wait(), x)[1])


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


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce(x.clone(), axis).wait()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(grad.clone(), ctx.axis).wait(), None


def all_gather_autograd(x: Tensor, axis: Axis) -> Tensor:
    """`all_gather` whose backward is `reduce_scatter`."""
    return x if axis.size == 1 else _AllGather.apply(x, axis)


def reduce_scatter_autograd(x: Tensor, axis: Axis) -> Tensor:
    """`reduce_scatter` whose backward is `all_gather`."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis)


def all_reduce_autograd(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, forward and backward (the sum of the ranks' gradients)."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis)
