"""Any number of collectives and transfers in flight, on several axes at once, finished in any order."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pentad.parallel.comm import collectives as c
from pentad.parallel.comm.collectives import Handle
from pentad.parallel.comm.mesh import Axis, Degrees, Mesh
from pentad.parallel.record.ring import Recorder
from tests.distributed import job_store, run_distributed
from tests.same_training import check

COUNT = 210
"""More than three times as many as a line shows at a time."""
LARGE = 3 << 13
"""Elements of an all-reduce in two steps."""

Started = tuple[Handle, Tensor]
"""A collective in flight and its result."""
_Start = Callable[[Axis, int], Started]


def _mesh(rank: int, **degrees: int) -> Mesh:
    recorder = Recorder(None, rank=rank, world=Degrees(**degrees).world, entries=256)
    return Mesh(Degrees(**degrees), store=job_store(), rank=rank, device="cpu", recorder=recorder, timeout_s=30)


def _x(rank: int, i: int, rows: int) -> Tensor:
    return torch.arange(rows * 2, dtype=torch.float64).view(rows, 2) + 1000 * rank + i


def _all(axis: Axis, i: int, rows: int) -> Tensor:
    return torch.stack([_x(r, i, rows) for r in range(axis.size)])


def _all_gather(axis: Axis, i: int) -> Started:
    return c.all_gather(_x(axis.rank, i, 2), axis), _all(axis, i, 2).flatten(0, 1)


def _reduce_scatter(axis: Axis, i: int) -> Started:
    rows = 2 * axis.size
    return c.reduce_scatter(_x(axis.rank, i, rows), axis), _all(axis, i, rows).sum(0).chunk(axis.size)[axis.rank]


def _all_reduce(axis: Axis, i: int) -> Started:
    op = ("sum", "max", "min")[i % 3]
    whole = _all(axis, i, 3)
    return c.all_reduce(_x(axis.rank, i, 3), axis, op), {"sum": whole.sum(0), "max": whole.amax(0)}.get(op, whole[0])


def _large_all_reduce(axis: Axis, i: int) -> Started:
    xs = [torch.full((LARGE,), 1.5 * r + i) for r in range(axis.size)]
    want = torch.stack(xs).sum(0)
    return c.all_reduce(xs[axis.rank], axis), want


def _rows(source: int, to: int, i: int) -> int:
    return (source + 2 * to + i) % 3


def _all_to_all(axis: Axis, i: int) -> Started:
    ranks = range(axis.size)
    parts = [[_x(10 * s + to, i, _rows(s, to, i)) for to in ranks] for s in ranks]
    send = [_rows(axis.rank, to, i) for to in ranks]
    receive = [_rows(s, axis.rank, i) for s in ranks]
    found = c.all_to_all(torch.cat(parts[axis.rank]), axis, send, receive)
    return found, torch.cat([parts[s][axis.rank] for s in ranks])


def _broadcast(axis: Axis, i: int) -> Started:
    source = i % axis.size
    return c.broadcast(_x(axis.rank, i, 2), axis, source), _x(source, i, 2)


def _broadcast_blocks(axis: Axis, i: int) -> Started:
    sources = [(i + 1) % axis.size, i % axis.size]
    want = torch.stack([_x(source, i, 4)[2 * j : 2 * j + 2] for j, source in enumerate(sources)]).flatten(0, 1)
    return c.broadcast_blocks(_x(axis.rank, i, 4), axis, sources), want


def _reduce(axis: Axis, i: int) -> Started:
    to = i % axis.size
    total = _all(axis, i, 2).sum(0)
    return c.reduce(_x(axis.rank, i, 2), axis, to), total if axis.rank == to else total[:0]


def _reduce_blocks(axis: Axis, i: int) -> Started:
    to = [r for r in range(axis.size) if r != i % axis.size]
    total = _all(axis, i, 2 * len(to)).sum(0).chunk(len(to))
    return c.reduce_blocks(_x(axis.rank, i, 2 * len(to)), axis, to), (
        total[to.index(axis.rank)] if axis.rank in to else total[0][:0]
    )


def _send(axis: Axis, i: int) -> Started:
    x = _x(axis.rank, i, 2)
    return c.send(x, axis, (axis.rank + 1) % axis.size), x


def _receive(axis: Axis, i: int) -> Started:
    before = (axis.rank - 1) % axis.size
    return c.receive(torch.empty(2, 2, dtype=torch.float64), axis, before), _x(before, i, 2)


COLLECTIVES: list[_Start] = [
    _all_gather,
    _reduce_scatter,
    _all_reduce,
    _large_all_reduce,
    _all_to_all,
    _broadcast,
    _broadcast_blocks,
    _reduce,
    _reduce_blocks,
]


def _finish(rank: int, started: list[Started], order: str) -> int:
    """Waits for all; how many are right."""
    if order == "reverse" or (order == "crossed" and rank % 2):
        started.reverse()
    if order == "random":
        random.Random(rank).shuffle(started)
    return sum(torch.equal(handle.wait(), want) for handle, want in started)


ORDERS = ("straight", "reverse", "crossed", "random")


def _kind(rank: int, world: int, at: int) -> list[int]:
    mesh = _mesh(rank, dp=world)
    axis = mesh.axis("dp")
    assert axis.local is not None
    right = [_finish(rank, [COLLECTIVES[at](axis, i) for i in range(COUNT)], order) for order in ORDERS]
    mesh.close()
    return right


@pytest.mark.distributed
@pytest.mark.parametrize("at", range(len(COLLECTIVES)), ids=lambda at: COLLECTIVES[at].__name__.strip("_"))
def test_any_number_of_collectives_may_be_outstanding(at: int):
    assert run_distributed(_kind, 3, at, group=False) == [[COUNT] * len(ORDERS)] * 3


def _transfers(rank: int, world: int) -> list[int]:
    mesh = _mesh(rank, dp=world)
    axis = mesh.axis("dp")
    right = []
    for order in ORDERS:
        for kinds in ((_receive, _send), (_send, _receive)):
            right.append(_finish(rank, [kind(axis, i) for kind in kinds for i in range(COUNT)], order))
    mesh.close()
    return right


@pytest.mark.distributed
def test_any_number_of_transfers_may_be_outstanding():
    assert run_distributed(_transfers, 3, group=False) == [[2 * COUNT] * 2 * len(ORDERS)] * 3


def _everything(rank: int, world: int) -> int:
    """All kinds mixed, over three axes, of which each pair of ranks shares at least one."""
    mesh = _mesh(rank, dp=2, tp=2)
    names = [random.Random(1).choice(["dp", "tp", "world"]) for _ in range(3 * COUNT)]
    started = []
    for i, name in enumerate(names):
        kind = random.Random(i).choice([*COLLECTIVES, _send, _receive])
        axis = mesh.axis(name)
        started += [_send(axis, i), _receive(axis, i)] if kind in (_send, _receive) else [kind(axis, i)]
    right = _finish(rank, started, "random") - len(started)
    mesh.close()
    return right


@pytest.mark.distributed
def test_collectives_of_several_axes_may_be_finished_in_any_order():
    assert run_distributed(_everything, 4, group=False) == [0] * 4


def _ahead(rank: int, world: int) -> int:
    """Rank 0 goes far ahead on one axis before rank 1 starts there: it waits for what rank 0 does afterwards."""
    mesh = _mesh(rank, dp=world)
    axis, other = mesh.axis("dp"), mesh.axis("world")
    early: list[Started] = []
    if rank == 0:
        early = [kind(axis, i) for i in range(COUNT) for kind in (_all_gather, _large_all_reduce, _send)]
    late = _all_reduce(other, 0)
    right = _finish(rank, [late], "straight")
    if rank == 1:
        early = [kind(axis, i) for i in range(COUNT) for kind in (_all_gather, _large_all_reduce)]
        early += [(c.receive(torch.empty(2, 2, dtype=torch.float64), axis, 0), _x(0, i, 2)) for i in range(COUNT)]
    right += _finish(rank, early, "random")
    mesh.close()
    return right


@pytest.mark.distributed
def test_starting_never_waits_for_those_that_are_behind():
    assert run_distributed(_ahead, 2, group=False) == [3 * COUNT + 1] * 2


def _dropped(rank: int, world: int) -> int:
    """Nobody waits for most of the handles."""
    mesh = _mesh(rank, dp=world)
    axis = mesh.axis("dp")
    last = [_all_gather(axis, i) for i in range(COUNT)][-1]
    right = _finish(rank, [last], "straight")
    for line in axis.local._lines if axis.local is not None else []:
        assert line is None or len(line[0]._unread) <= 64, "what has been read is let go"
    right += _finish(rank, [_all_reduce(axis, 0)], "straight")
    mesh.close()
    return right


@pytest.mark.distributed
def test_what_nobody_waits_for_holds_nobody_up_and_no_memory():
    assert run_distributed(_dropped, 3, group=False) == [2] * 3


@pytest.mark.distributed
def test_more_gradient_buckets_than_slots_train_like_one_process():
    model = {"layers": 4, "ffn": 32, "vocab": 64}
    check(dp=2, bucket_mib=0.0001, steps=2, model=model)


@pytest.mark.distributed
def test_a_gradient_that_waits_over_many_collectives_trains_like_one_process():
    model = {"layers": 8, "ffn": 32, "vocab": 320, "mtp": 1}
    check(tp=2, steps=2, seq_len=16, model=model)


def _posted_before_it_is_expected(rank: int, world: int) -> list[float]:
    """Rank 0 has posted two collectives when rank 1 starts the first, and rank 1 waits for neither at first."""
    mesh = _mesh(rank, tp=world, dp=1)
    axis, store = mesh.axis("tp"), dist.PrefixStore("order", job_store())
    if rank == 1:
        store.wait(["both are posted"])
    first, second = (c.all_reduce(torch.ones(1), axis) for _ in range(2))
    if rank == 0:
        store.set("both are posted", "")
        both = [float(first.wait()), float(second.wait())]
        c.send(torch.ones(1), axis, 1).wait()
    else:
        c.receive(torch.empty(1), axis, 0).wait()  # comes after rank 0 has both
        both = [float(first.wait()), float(second.wait())]
    mesh.close()
    return both


@pytest.mark.distributed
def test_what_was_posted_before_it_was_expected_is_read_while_the_rank_waits_for_something_else():
    assert run_distributed(_posted_before_it_is_expected, 2, group=False) == [[2.0, 2.0]] * 2
