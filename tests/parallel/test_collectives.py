"""Collectives: values against a loop over ranks, groups by sums that only the right members give, the record."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pentad.parallel import collectives as c
from pentad.parallel.mesh import Axis, Degrees, Mesh
from pentad.parallel.record import Recorder
from pentad.parallel.waiting import Abort, Aborted
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
    for form in (c.all_gather_autograd, c.reduce_scatter_autograd, c.all_reduce_autograd):
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
        torch.testing.assert_close(grads[2], sum(_input(10 + r, 4, torch.float64) for r in range(2)))


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
    if rank == 1:
        time.sleep(1.0)
        c.all_reduce(torch.ones(4), mesh.axis("dp")).wait()
        return "slow"
    threading.Timer(0.2, mesh.abort.trigger, ["a peer is gone"]).start()
    handle = c.all_reduce(torch.ones(4), mesh.axis("dp"))
    try:
        handle.wait()
    except Aborted as error:
        time.sleep(1.2)  # the abandoned operation ends by itself
        return str(error)
    return "not aborted"


@pytest.mark.distributed
def test_a_wait_can_be_aborted():
    assert run_distributed(_aborted, 2, group=False)[0] == "all_reduce over dp: a peer is gone"


def test_wait_times_out_with_the_name_of_the_operation():
    with pytest.raises(TimeoutError, match=r"all_gather over tp .* faults\.timeout_s"):
        Abort(0.01).wait(threading.Event(), "all_gather over tp")


def test_one_rank_communicates_nothing():
    x, axis = torch.arange(4.0), Axis.single("tp")
    for collective in (c.all_gather, c.reduce_scatter, c.all_reduce, c.all_to_all):
        assert collective(x, axis).wait() is x
