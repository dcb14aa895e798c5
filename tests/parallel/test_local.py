"""Memory to memory: who is reached, what happens when a process is gone, and many posts in flight."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pentad.parallel import collectives as c
from pentad.parallel.processes import Identity, PeerGone, Process, identity
from tests.distributed import run_distributed
from tests.training import job, open_mesh


def _is_local(rank: int, world: int) -> bool:
    mesh = open_mesh(rank, job(tp=2, dp=2))
    found = all(mesh.axis(name).local is not None for name in ("tp", "dp", "world"))
    mesh.close()
    return found


def _allowed() -> bool:
    """Whether this host lets a user's processes read each other, by other means than the code under test asks."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if (
        platform.system() != "Linux"
        or platform.machine() != "x86_64"
        or (scope.exists() and int(scope.read_text()) > 1)
    ):
        return False
    theirs, ours = ctypes.c_int64(7), ctypes.c_int64()
    try:
        Process(0, identity(os.getpid())).read(ctypes.addressof(theirs), ctypes.addressof(ours), 8)
    except PeerGone:  # a container may forbid the call itself
        return False
    return True


@pytest.mark.distributed
def test_ranks_of_one_host_reach_each_other_where_they_may():
    assert run_distributed(_is_local, 4, group=False) == [_allowed()] * 4


def _child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_process_that_is_gone_is_named():
    child, word = _child(), ctypes.c_int64()
    process = Process(3, identity(child.pid))
    assert process.alive()
    child.kill()
    child.wait()
    assert not process.alive()
    with pytest.raises(PeerGone, match=rf"rank 3 \(process {child.pid}\) cannot be reached"):
        process.read(ctypes.addressof(word), ctypes.addressof(word), 8)


def test_another_process_of_the_same_id_is_not_taken_for_the_first():
    child = _child()
    now = identity(child.pid)
    with pytest.raises(PeerGone, match=rf"rank 0 \(process {child.pid}\) cannot be reached"):
        Process(0, Identity(now.pid, now.start - 1))
    child.kill()
    child.wait()


def _burst(rank: int, world: int, count: int) -> list[float]:
    """More transfers in flight than a board has slots, sent before the other side looks, and collectives between."""
    mesh = open_mesh(rank, job(pp=2))
    to, back = mesh.channel(rank, 1 - rank), mesh.channel(1 - rank, rank)
    pp, out = mesh.axis("pp"), []
    for first in range(0, count, 20):
        sent = [c.send(torch.full((3,), float(100 * rank + i)), to, 1) for i in range(first, first + 20)]
        total = c.all_reduce(torch.ones(1), pp)
        received = [c.receive(torch.empty(3), back, 0) for _ in range(20)]
        assert float(total.wait()) == world
        out += [float(handle.wait()[2]) for handle in received]
        for handle in sent:
            handle.wait()
    mesh.close()
    return out


@pytest.mark.distributed
def test_slots_are_used_again():
    first, second = run_distributed(_burst, 2, 100, group=False)
    assert first == [100.0 + i for i in range(100)]
    assert second == [float(i) for i in range(100)]
