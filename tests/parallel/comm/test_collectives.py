"""Collectives: values against a loop over ranks, groups by sums that only the right members give, the record."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.parallel.comm import collectives as c
from pentad.parallel.comm.mesh import Axis, Degrees, Mesh
from pentad.parallel.comm.waiting import Abort, Aborted
from pentad.parallel.record import reader
from pentad.parallel.record.ring import Recorder
from tests.distributed import job_store, run_distributed
from tests.training import job, open_mesh


def _members(rank: int, world: int) -> dict[str, float]:
    """Sum of 2^rank over each axis: any wrong group gives a wrong sum."""
    mesh = open_mesh(rank, job(tp=4, dp=2, model={"kv_heads": 2}))
    names = ("tp", "tp_shard", "tp_replica", "dp", "data", "edp", "world")
    sums = {n: float(c.all_reduce(torch.tensor([2.0**rank]), mesh.axis(n)).wait()) for n in names}
    mesh.close()
    return sums


@pytest.mark.distributed
def test_groups_have_the_right_members():
    for rank, sums in enumerate(run_distributed(_members, 8, group=False)):
        tp = range(rank // 4 * 4, rank // 4 * 4 + 4)
        expected = {
            "tp": tp,
            "tp_replica": [r for r in tp if r // 2 == rank // 2],
            "tp_shard": [r for r in tp if r % 2 == rank % 2],
            "dp": [r for r in range(8) if r % 4 == rank % 4],
            "data": [r for r in range(8) if r % 4 == rank % 4],
            "edp": range(8),
            "world": range(8),
        }
        assert sums == {name: float(sum(2**r for r in ranks)) for name, ranks in expected.items()}


def _expert_axes(rank: int, world: int) -> dict[str, tuple[int, ...]]:
    recorder = Recorder(None, rank=rank, world=world, entries=64)
    mesh = Mesh(Degrees(tp=2, pp=2, dp=2, ep=2, etp=1), store=job_store(), rank=rank, device="cpu", recorder=recorder)
    ranks = {name: mesh.axis(name).ranks for name in ("tp", "dp", "pp", "edp", "ep", "etp")}
    mesh.close()
    return ranks


@pytest.mark.distributed
def test_both_factorisations_share_the_pipeline_axis():
    for rank, axes in enumerate(run_distributed(_expert_axes, 8, group=False)):
        stage = rank // 4 * 4
        assert axes["pp"] == (rank % 4, rank % 4 + 4)
        assert axes["tp"] == (rank // 2 * 2, rank // 2 * 2 + 1)
        assert axes["dp"] == (stage + rank % 2, stage + rank % 2 + 2)
        assert axes["ep"] == (rank // 2 * 2, rank // 2 * 2 + 1)
        assert axes["edp"] == (stage + rank % 2, stage + rank % 2 + 2)
        assert axes["etp"] == (rank,)


def _values(rank: int, world: int) -> list[torch.Tensor]:
    mesh = open_mesh(rank, job(tp=world))
    axis = mesh.axis("tp")
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        for rows in (world, 40 * world, 1 << 15):  # the last one takes the path of large tensors
            x = _input(rank, rows, dtype)
            results += [
                c.all_gather(x, axis).wait(),
                c.reduce_scatter(x, axis).wait(),
                c.all_reduce(x.clone(), axis).wait(),
                c.all_reduce(x.clone(), axis, "max").wait(),
                c.all_to_all(x, axis).wait(),
                c.broadcast(x.clone(), axis, 1).wait(),
            ]
    uneven = torch.arange(world * (world + 1) // 2).double() + 100 * rank
    sends = [i + 1 for i in range(world)]
    results.append(c.all_to_all(uneven, axis, sends, [rank + 1] * world).wait())
    mesh.close()
    return results


def _input(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.distributed
def test_values():
    world = 4
    outputs = run_distributed(_values, world, group=False)
    for rank in range(world):
        found = iter(outputs[rank])
        for dtype in (torch.float64, torch.bfloat16):
            for rows in (world, 40 * world, 1 << 15):
                xs = torch.stack([_input(r, rows, dtype) for r in range(world)])
                total = xs.sum(0)
                near = 2e-2 if dtype == torch.bfloat16 else 1e-14
                torch.testing.assert_close(next(found), xs.flatten(0, 1), rtol=0, atol=0)
                torch.testing.assert_close(next(found), total.chunk(world)[rank], rtol=near, atol=near)
                torch.testing.assert_close(next(found), total, rtol=near, atol=near)
                torch.testing.assert_close(next(found), xs.amax(0), rtol=0, atol=0)
                torch.testing.assert_close(next(found), torch.cat([x.chunk(world)[rank] for x in xs]), rtol=0, atol=0)
                torch.testing.assert_close(next(found), xs[1], rtol=0, atol=0)
        start = rank * (rank + 1) // 2
        parts = [torch.arange(start, start + rank + 1).double() + 100 * r for r in range(world)]
        torch.testing.assert_close(next(found), torch.cat(parts), rtol=0, atol=0)


def _gradients(rank: int, world: int) -> list[torch.Tensor]:
    mesh = open_mesh(rank, job(tp=world))
    axis = mesh.axis("tp")
    grads = []
    for form in (c.all_gather_autograd, c.reduce_scatter_autograd):
        x = _input(rank, 4, torch.float64).requires_grad_()
        y = form(x, axis)
        (y * _input(10 + rank, y.shape[0], torch.float64)).sum().backward()
        grads.append(x.grad)
    mesh.close()
    return grads


@pytest.mark.distributed
def test_autograd_is_the_transpose():
    first, second = run_distributed(_gradients, 2, group=False)
    weight = [_input(10 + r, 8, torch.float64) for r in range(2)]
    for rank, grads in enumerate((first, second)):
        torch.testing.assert_close(grads[0], (weight[0] + weight[1])[4 * rank : 4 * rank + 4])
        torch.testing.assert_close(grads[1], torch.cat([_input(10 + r, 2, torch.float64) for r in range(2)]))


def _rebuilt(rank: int, world: int) -> list[float]:
    """Three epochs; the last one without rank 2."""
    sums = []
    for epoch, alive in enumerate(((0, 1, 2), (0, 1, 2), (0, 1))):
        if rank not in alive:
            break
        recorder = Recorder(None, rank=rank, world=world, entries=64)
        mesh = Mesh(Degrees(dp=len(alive)), store=job_store(), rank=rank, device="cpu", recorder=recorder, epoch=epoch)
        sums.append(float(c.all_reduce(torch.tensor([2.0**rank]), mesh.axis("dp")).wait()))
        mesh.close()
    return sums


@pytest.mark.distributed
def test_mesh_can_be_rebuilt_with_fewer_ranks():
    assert run_distributed(_rebuilt, 3, group=False) == [[7.0, 7.0, 3.0], [7.0, 7.0, 3.0], [7.0, 7.0]]


def _aborted(rank: int, world: int) -> str:
    mesh = open_mesh(rank, job(dp=2))
    if rank == 1:  # comes too late
        time.sleep(1.0)
        threading.Timer(0.2, mesh.abort.trigger, ["the others have left"]).start()
    else:
        threading.Timer(0.2, mesh.abort.trigger, ["a peer is gone"]).start()
    handle = c.all_reduce(torch.ones(4), mesh.axis("dp"))
    try:
        handle.wait()
    except Aborted as error:
        time.sleep(1.2 if rank == 0 else 0.0)  # both are gone before the mesh is
        return str(error)
    return "not aborted"


@pytest.mark.distributed
def test_a_wait_can_be_aborted():
    assert run_distributed(_aborted, 2, group=False)[0] == "all_reduce over dp: a peer is gone"


def test_wait_times_out_with_the_name_of_the_operation():
    with pytest.raises(TimeoutError, match=r"all_gather over tp waited .*faults\.timeout_s.* pentad diagnose"):
        Abort(0.01).wait(threading.Event(), "all_gather over tp")


def test_one_rank_communicates_nothing():
    x, axis = torch.arange(4.0), Axis.single("tp")
    for collective in (c.all_gather, c.reduce_scatter, c.all_reduce, c.all_to_all):
        assert collective(x, axis).wait() is x


def _mesh(rank: int, degrees: Degrees, *, record: Path | None = None, timeout_s: float = 60.0, **groups: Any) -> Mesh:
    recorder = Recorder(record, rank=rank, world=degrees.world, entries=256)
    store = job_store()
    return Mesh(degrees, store=store, rank=rank, device="cpu", recorder=recorder, timeout_s=timeout_s, **groups)


def _over_torch(axis: Axis) -> Axis:
    """The axis without the way through memory that CPU ranks of one host have."""
    return replace(axis, local=None)


def _pipeline_axes(rank: int, world: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    channels = [(0, 1), (1, 0)]
    mesh = _mesh(rank, Degrees(tp=2, pp=2, dp=2), channels=channels, vocab=True, ends=(0, 1))
    axes = [mesh.axis(n) for n in ("vocab_head", "vocab_embed", "ends")] + [mesh.channel(*pair) for pair in channels]
    sums = [float(c.all_reduce(torch.tensor([2.0**rank]), axis).wait()) for axis in axes[:3]]
    assert sums == [float(sum(2**r for r in axis.ranks)) for axis in axes[:3]]
    with pytest.raises(KeyError):
        mesh.channel(0, 0)
    mesh.close()
    return {axis.name: (axis.rank, axis.ranks) for axis in axes}


@pytest.mark.distributed
def test_axes_of_a_pipeline():
    for rank, axes in enumerate(run_distributed(_pipeline_axes, 8, group=False)):
        pp, dp, tp = rank // 4, rank // 2 % 2, rank % 2
        vocab = tuple(4 * stage + 2 * dp + t for stage in range(2) for t in range(2))
        peer = (rank % 4, rank % 4 + 4)
        assert axes == {
            "vocab_head": (2 * pp + tp, vocab),
            "vocab_embed": (2 * pp + tp, vocab),
            "ends": (pp, peer),
            "channel 0>1": (pp, peer),
            "channel 1>0": (1 - pp, peer[::-1]),
        }


def _inner_ranks(rank: int, world: int) -> tuple[int, int, bool]:
    """Sizes of `ends` and a channel on each rank, and whether anything is there that was not asked for."""
    mesh = _mesh(rank, Degrees(pp=4), channels=[(0, 3)], ends=(3, 0))
    sizes = mesh.axis("ends").size, mesh.channel(0, 3).size, mesh.axis("vocab_head").size > 1
    mesh.close()
    return sizes


@pytest.mark.distributed
def test_axes_of_some_ranks_have_size_1_on_the_others():
    outputs = run_distributed(_inner_ranks, 4, group=False)
    assert outputs == [(2, 2, False), (1, 1, False), (1, 1, False), (2, 2, False)]


def _transfers(rank: int, world: int, record: Path, memory: bool) -> list[float]:
    """Both directions between the same two ranks at once, several outstanding, sizes and precisions mixed."""
    mesh = _mesh(rank, Degrees(pp=2), record=record / str(rank), channels=[(1, 0), (0, 1)])
    mesh.recorder.context = (3, 1, 9)
    to, back = mesh.channel(rank, 1 - rank), mesh.channel(1 - rank, rank)
    if not memory:
        to, back = _over_torch(to), _over_torch(back)
    payloads = [
        torch.full((size,), 10.0 * rank + k, dtype=torch.bfloat16 if k % 2 else torch.float64)
        for k, size in enumerate((7, 1 << 19, 1, 1 << 18, 300, 1 << 16))
    ]
    outs = [torch.zeros_like(x) for x in payloads]
    sends = [c.send(x, to, 1) for x in payloads]
    receives = [c.receive(out, back, 0) for out in outs]
    values = []
    for handle, out in zip(receives, outs, strict=True):
        assert handle.wait() is out and handle.done()
        values.append(float(out.unique()))
    for handle in sends:
        handle.wait()
        assert handle.done()
    mesh.close()
    return values


@pytest.mark.distributed
@pytest.mark.parametrize("memory", [True, False])
def test_transfers_keep_their_order_in_both_directions_at_once(tmp_path: Path, memory: bool):
    assert run_distributed(_transfers, 2, tmp_path, memory, group=False) == [
        [10.0, 11.0, 12.0, 13.0, 14.0, 15.0],
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    ]
    for rank in range(2):
        ring = reader.read(tmp_path / str(rank))
        sends = [e for e in ring.entries if ring.name(e["kind"]) == "send"]
        receives = [e for e in ring.entries if ring.name(e["kind"]) == "receive"]
        assert [int(e["nbytes"]) for e in sends] == [56, 1 << 20, 8, 1 << 19, 2400, 1 << 17]
        assert [int(e["seq"]) for e in receives] == list(range(6))
        for e in sends + receives:
            assert e["end"] >= e["start"] > 0 and e["peer"] == 1 - rank
            assert (e["step"], e["micro_batch"], e["op"]) == (3, 1, 9)


def _early(rank: int, world: int, record: Path) -> list[bool]:
    """Both ends of both transfers are seen, and recorded, although nobody waits for them."""
    mesh = _mesh(rank, Degrees(pp=2), record=record / str(rank), channels=[(0, 1), (1, 0)])
    to, back = _over_torch(mesh.channel(rank, 1 - rank)), _over_torch(mesh.channel(1 - rank, rank))
    x, out = torch.ones(1 << 18), torch.zeros(1 << 18)
    receive = c.receive(out, back, 0)
    before = receive.done()
    c.all_reduce(torch.zeros(1), mesh.axis("world")).wait()  # nobody sends before both have posted
    send = c.send(x, to, 1)
    deadline = time.monotonic() + 30
    while not all([send.done(), receive.done()]) and time.monotonic() < deadline:
        time.sleep(0.001)
    ended = len(reader.read(record / str(rank)).open()) == 0
    found = [before, send.done(), receive.done(), ended]
    send.wait()
    receive.wait()
    mesh.close()
    return found


@pytest.mark.distributed
def test_the_end_of_a_transfer_is_seen_without_waiting_for_it(tmp_path: Path):
    assert run_distributed(_early, 2, tmp_path, group=False) == [[False, True, True, True]] * 2


def _receive_aborted(rank: int, world: int, memory: bool) -> str:
    mesh = _mesh(rank, Degrees(pp=2), channels=[(1, 0)])
    channel, message = mesh.channel(1, 0) if memory else _over_torch(mesh.channel(1, 0)), ""
    if rank == 0:
        handle = c.receive(torch.zeros(4), channel, 0)
        threading.Timer(0.2, mesh.abort.trigger, ["a peer is gone"]).start()
        with pytest.raises(Aborted) as raised:
            handle.wait()
        message = str(raised.value)
        job_store().set("given up", "")
    else:
        job_store().wait(["given up"])  # a rank that ended would be noticed before the abort
    mesh.close()  # does not wait for what was given up
    return message


@pytest.mark.distributed
@pytest.mark.parametrize("memory", [True, False])
def test_a_receive_can_be_aborted(memory: bool):
    assert run_distributed(_receive_aborted, 2, memory, group=False)[0] == "receive over channel 1>0: a peer is gone"


def test_receiving_needs_contiguous_memory():
    with pytest.raises(ValueError, match="contiguous"):
        c.receive(torch.zeros(4, 4).t(), Axis.single("pp"), 0)


def _reductions(rank: int, world: int, memory: bool) -> list[torch.Tensor]:
    mesh = _mesh(rank, Degrees(pp=world), vocab=True)
    axis, results = mesh.axis("vocab_head") if memory else _over_torch(mesh.axis("vocab_head")), []
    for dtype in (torch.float64, torch.bfloat16):
        x = _input(rank, 12, dtype)
        results += [c.reduce(x.clone(), axis, 2).wait(), c.reduce_blocks(x.clone(), axis, (1, 3)).wait()]
        whole = torch.zeros(12, 3, dtype=dtype)
        if rank in (1, 3):
            whole[6 * (rank == 3) :][:6] = x[:6]
        results.append(c.broadcast_blocks(whole, axis, (1, 3)).wait())
    mesh.close()
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("memory", [True, False])
def test_sums_to_owners_and_back(memory: bool):
    world = 4
    outputs = run_distributed(_reductions, world, memory, group=False)
    for k, dtype in enumerate((torch.float64, torch.bfloat16)):
        xs = [_input(r, 12, dtype) for r in range(world)]
        total = torch.stack(xs).sum(0)
        for rank, results in enumerate(outputs):
            one, blocks, spread = results[3 * k : 3 * k + 3]
            assert one.dtype == blocks.dtype == dtype
            torch.testing.assert_close(one, total if rank == 2 else total[:0], rtol=0, atol=0)
            mine = {1: total[:6], 3: total[6:]}.get(rank, total[:0])
            torch.testing.assert_close(blocks, mine, rtol=0, atol=0)
            torch.testing.assert_close(spread, torch.cat([xs[1][:6], xs[3][:6]]), rtol=0, atol=0)
