"""Probes try every pair once, and name the rank or the link that falls short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pentad.parallel.comm.link_probe import rounds
from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.record.ring import Recorder
from pentad.trainer.metrics.probe import Probe, judge, probe, probe_lines
from tests.distributed import job_store, run_distributed

HOSTS = {rank: f"node{rank // 4}" for rank in range(8)}


@pytest.mark.parametrize("size", (1, 2, 3, 5, 8))
def test_every_pair_meets_once_and_nobody_twice_at_a_time(size: int) -> None:
    found = rounds(size)
    assert sorted(pair for pairs in found for pair in pairs) == [
        (a, b) for a in range(size) for b in range(a + 1, size)
    ]
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in found)


def _times() -> np.ndarray:
    """Eight ranks on two nodes: 10 µs within one, 50 µs between them."""
    node = np.arange(8) // 4
    return np.where(node[:, None] == node[None], 10e-6, 50e-6)


def test_nobody_is_named_where_all_are_alike() -> None:
    found = judge(np.full(8, 100.0), _times(), _times(), HOSTS)
    assert found.slow == () and found.delay_us == pytest.approx([50] * 8)
    assert len(probe_lines(found)) == 2


def test_a_slow_device_a_slow_rank_and_a_slow_link_are_named() -> None:
    rates, small, large = np.full(8, 100.0), _times(), _times()
    rates[3] = 80.0
    small[2, 6] = small[6, 2] = 200e-6
    large[5, :], large[:, 5] = 4 * large[5], 4 * large[:, 5]
    device, link, *rank = judge(rates, small, large, HOSTS).slow
    assert device == "rank 3 on node0 multiplies at 80 TFLOP/s, the median rank at 100"
    assert link == "ranks 2 on node0 and 6 on node1 take 200 µs for 64 KiB, the median is 50 µs"
    assert rank == [
        "rank 5 on node1 takes 40 µs for 8 MiB within its node, the median is 10 µs",
        "rank 5 on node1 takes 200 µs for 8 MiB between nodes, the median is 50 µs",
    ]


def _probe(rank: int, world: int) -> Probe:
    recorder = Recorder(None, rank=rank, world=world, entries=4096)
    mesh = Mesh(Degrees(dp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder)
    found = probe(mesh, torch.device("cpu"), torch.float32, {})
    mesh.close()
    return found


def test_ranks_probe_each_other() -> None:
    first, *others = run_distributed(_probe, 3, group=False)
    assert all(other == first for other in others)
    assert len(first.tflops) == len(first.delay_us) == len(first.gb_s) == 3
    assert min(first.tflops) > 0 and min(first.delay_us) > 0 and min(first.gb_s) > 0
