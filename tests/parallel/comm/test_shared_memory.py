"""Memory to memory: who is reached, who may read, and what happens when a process is gone or late."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pentad.parallel.comm import collectives as c
from pentad.parallel.comm import shared_memory_connect
from pentad.parallel.comm.collectives import Handle
from pentad.parallel.comm.processes import Identity, PeerGone, Process, ancestors, common_ancestor, identity
from pentad.parallel.comm.shared_memory_connect import Card
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


def _told(flag: Path) -> None:
    deadline = time.monotonic() + 30
    while not flag.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _end(handle: Handle) -> str:
    """How a wait ends."""
    try:
        return f"returned {float(handle.wait().sum())}"
    except PeerGone as error:
        return re.sub(r" \(process \d+\)", "", str(error))


def _late_sender(rank: int, world: int, folder: Path) -> str:
    """Rank 1 announces a receive and gives up; rank 0, which was stopped all the time, then sends."""
    mesh = open_mesh(rank, job(pp=2))
    axis, gone, sent = mesh.channel(0, 1), folder / "gone", folder / "sent"
    if rank == 1:
        out = torch.zeros(4)
        c.receive(out, axis, 0)
        mesh.abort.trigger("rank 0 is silent")
        mesh.close()
        gone.touch()
        _told(sent)
        return f"{float(out.sum())} is there"  # the memory is anybody's by now
    _told(gone)
    end = _end(c.send(torch.ones(4), axis, 1))
    sent.touch()
    mesh.close()
    return end


@pytest.mark.distributed
def test_a_sender_that_wakes_up_late_writes_into_nobodys_memory(tmp_path: Path):
    assert run_distributed(_late_sender, 2, tmp_path, group=False) == ["rank 1 has left", "0.0 is there"]


def _late_reader(rank: int, world: int, folder: Path) -> str:
    """Rank 1 posts, gives up and uses its memory for something else; rank 0 reads late."""
    mesh = open_mesh(rank, job(pp=2))
    axis, gone, read = mesh.axis("pp"), folder / "gone", folder / "read"
    x = torch.ones(4)
    if rank == 1:
        c.all_gather(x, axis)
        mesh.abort.trigger("rank 0 is silent")
        mesh.close()
        x.fill_(-7)
        gone.touch()
        _told(read)
        return ""
    _told(gone)
    end = _end(c.all_gather(x, axis))
    read.touch()
    mesh.close()
    return end


@pytest.mark.distributed
def test_a_reader_that_wakes_up_late_is_told(tmp_path: Path):
    assert run_distributed(_late_reader, 2, tmp_path, group=False) == ["rank 1 has left", ""]


def _write(rank: int, world: int) -> str:
    mesh = open_mesh(rank, job(dp=2))
    local = mesh.axis("dp").local
    assert local is not None
    pair = local._lines[1 - rank]
    assert pair is not None
    try:
        pair[0].peer.words[0] = 1
    except TypeError as error:
        return str(error)
    finally:
        mesh.close()
    return "written"


@pytest.mark.distributed
def test_what_others_share_is_read_only():
    assert run_distributed(_write, 2, group=False) == ["cannot modify read-only memory"] * 2


def _mixed_up(rank: int, world: int) -> str:
    mesh = open_mesh(rank, job(dp=2))
    axis = mesh.axis("dp")
    try:
        c.all_gather(torch.ones(3 + rank), axis).wait()
    except RuntimeError as error:
        return str(error)
    finally:
        mesh.close()
    return "gathered"


@pytest.mark.distributed
def test_calls_that_do_not_match_are_refused_with_both_sizes():
    first, second = run_distributed(_mixed_up, 2, group=False)
    assert first.startswith("all_gather over dp: rank 1 gives 16 bytes where 12 are expected")
    assert second.startswith("all_gather over dp: rank 0 gives 12 bytes where 16 are expected")


def _apart(rank: int, world: int, how: str) -> tuple[str, float]:
    refused = PeerGone("rank 0 (process 7) cannot be reached: Operation not permitted")
    changed = {
        "hosts": patch.object(shared_memory_connect, "_host", lambda: f"host {rank // 2}"),
        "kernel": patch.object(Process, "read", side_effect=refused) if rank == 2 else nullcontext(),
        "machine": patch.object(shared_memory_connect.platform, "machine", lambda: "aarch64"),
    }[how]
    with changed:
        mesh = open_mesh(rank, job(dp=4))
    axis = mesh.axis("dp")
    assert axis.local is None
    total = float(c.all_reduce(torch.ones(1), axis).wait())
    mesh.close()
    return mesh.apart, total


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("hosts", "they stand on 2 hosts"),
        ("kernel", "rank 0 (process 7) cannot be reached: Operation not permitted"),
        ("machine", "it needs Linux on x86_64, this is Linux on aarch64"),
    ],
)
def test_ranks_that_cannot_read_each_other_agree_on_gloo_and_say_why(how: str, why: str):
    assert run_distributed(_apart, 4, how, group=False) == [(why, 4.0)] * 4


def test_ancestors_end_with_the_first_process():
    chain = ancestors(os.getpid())
    assert [each.pid for each in chain[:2]] == [os.getpid(), os.getppid()]
    child = _child()
    assert common_ancestor([chain, ancestors(child.pid)]) == chain[0]
    child.kill()
    child.wait()


def _allowed_to(parents: list[list[int]], scope: int, ours: bool) -> tuple[list[int], str]:
    """Whom rank 0 lets read its memory, and why nobody; `parents`: each rank's chain of processes."""
    cards = [Card("host", "", tuple(Identity(p, 5 * p) for p in chain), scope, 3, 9, {}, 0) for chain in parents]
    store = dist.HashStore()
    for rank in range(1, len(cards)):
        store.set(f"allows-{rank}", "")
    with (
        patch.object(shared_memory_connect, "allow_descendants") as allow,
        patch.object(shared_memory_connect, "_is_ours", lambda _: ours),
    ):
        problem = shared_memory_connect._allow(cards, 0, store)
    return [call.args[0] for call in allow.call_args_list], problem


def test_only_the_launcher_and_what_it_started_may_read_a_rank():
    launched = [[20, 12, 5, 1], [21, 12, 5, 1], [30, 13, 5, 1]]
    assert _allowed_to(launched, 1, ours=False) == ([5], "")
    assert _allowed_to([[20, 1], [21, 1]], 1, ours=True) == ([1], ""), "in a container the launcher is process 1"
    assert _allowed_to(launched, 0, ours=False) == ([], ""), "all may: nothing to ask for"
    assert _allowed_to(launched, 2, ours=False) == ([], ""), "none may: nothing to ask for"
    nobody, problem = _allowed_to([[20, 1], [21, 1]], 1, ours=False)
    assert nobody == [] and "kernel.yama.ptrace_scope is 1" in problem


def test_several_threads_may_ask_whether_a_process_lives():
    child = _child()
    process, found, together = Process(0, identity(child.pid)), [], threading.Barrier(4)

    def ask() -> None:
        together.wait()
        found.append(all(process.alive() for _ in range(20_000)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    child.kill()
    child.wait()
