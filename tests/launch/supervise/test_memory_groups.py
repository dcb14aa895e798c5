"""Ranks that the kernel's out-of-memory killer ended, told from others by the counts of a stand-in control group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pentad.launch.supervise.memory_groups import MemoryGroup
from pentad.launch.supervise.watched import WatchedRank
from pentad.parallel.record.diagnosis import diagnose
from pentad.parallel.record.patience import Patience
from pentad.parallel.record.stand import Condition
from pentad.parallel.record.stand_text import dump_stand, load_stand
from pentad.parallel.record.verdict_words import Places

_RANK = """
import sys
from pentad.parallel.record.ring import create
recorder = create(sys.argv[1], rank=1, world=2, entries=64)
recorder.vitals.enter("step")
recorder.step = 16
recorder.enter(recorder.intern("F"))
print(recorder.path, flush=True)
sys.stdin.read()
"""


def _write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def _write_counts(root: Path, kills: int) -> None:
    events = f"low 0\nhigh 0\nmax 9\noom 5\noom_kill {kills}\n"
    _write(root / "cgroup" / "job" / "rank", memory__events=events, memory__max="max\n")
    _write(root / "cgroup" / "job", memory__events=events, memory__max=f"{2 << 30}\n")


def _group(root: Path) -> MemoryGroup:
    """A job's group with a limit of 2 GiB, the rank's own inside it without one."""
    _write(root / "proc" / "7", cgroup="0::/job/rank\n")
    _write_counts(root, 3)
    group = MemoryGroup.of(7, root / "cgroup", root / "proc")
    assert group is not None
    return group


def test_version_2_counts_in_the_own_group_and_is_limited_by_any_above(tmp_path: Path) -> None:
    group = _group(tmp_path)
    file = tmp_path / "cgroup" / "job" / "memory.max"
    assert (group.kills(), group.lowest_limit()) == (3, (2 << 30, file))
    assert group.limit_words() == f"the limit of 2 GiB in {file}"
    _write(tmp_path / "cgroup" / "job" / "rank", memory__max=f"{1 << 29}\n")
    assert group.limit_words().startswith("the limit of 0.5 GiB in ")


def test_version_1_and_a_container_in_which_the_path_is_not_there(tmp_path: Path) -> None:
    _write(tmp_path / "proc" / "7", cgroup="9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/\n0::/\n")
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"
    _write(tmp_path / "cgroup" / "memory", memory__oom_control=control, memory__limit_in_bytes="9223372036854771712\n")
    group = MemoryGroup.of(7, tmp_path / "cgroup", tmp_path / "proc")
    assert group is not None and group.kills() == 2 and group.lowest_limit() is None
    assert group.limit_words().startswith("the memory of the machine")
    assert MemoryGroup.of(8, tmp_path / "cgroup", tmp_path / "proc") is None
    _write(tmp_path / "cgroup" / "memory", memory__oom_control="oom_kill_disable 0\n")
    assert group.kills() is None, "kernels before 4.13 do not count"


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[WatchedRank, subprocess.Popen[str]]]:
    """A rank that is watched, in the stand-in group."""
    group = _group(tmp_path)
    monkeypatch.setattr(MemoryGroup, "of", staticmethod(lambda pid: group))
    process = subprocess.Popen(
        [sys.executable, "-c", _RANK, f"oom-{os.getpid()}-{tmp_path.name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    ring = Path(process.stdout.readline().strip())
    watched = WatchedRank(ring, Patience(5, 60, 300), "node1")
    yield watched, process
    watched.close()
    process.communicate()
    ring.unlink()


@pytest.mark.parametrize("kills", [3, 4])
def test_a_rank_is_out_of_memory_where_the_count_has_risen(
    rank: tuple[WatchedRank, subprocess.Popen[str]], tmp_path: Path, kills: int
) -> None:
    watched, process = rank
    assert watched.starved() == ""
    _write_counts(tmp_path, kills)
    process.send_signal(signal.SIGKILL)
    while not watched.has_ended():
        time.sleep(0.01)
    stand = watched.stand(time.monotonic(), Condition.DEAD)
    assert load_stand(json.loads(json.dumps(dump_stand(stand)))) == stand
    verdict = diagnose({1: stand}, Places(2))
    assert verdict is not None and verdict.ranks == (1,) and verdict.code == 137
    if kills == 3:
        assert verdict.kind == "killed" and "SIGKILL" in verdict.line
        return
    limit = f"the limit of 2 GiB in {tmp_path}/cgroup/job/memory.max"
    assert verdict.kind == "out of memory"
    assert verdict.line == (
        f"rank 1 was killed by the kernel's out-of-memory killer on node1, in step 17, for {limit}: raise it, lower "
        "train.micro_batch or set memory.recompute"
    )
