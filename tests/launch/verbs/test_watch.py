"""`pentad watch`: of ranks that compute, wait, are stopped and are dead, on paper and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pentad.launch.cli import main
from pentad.launch.verbs.watch_screen import plain_text, screen_lines
from pentad.launch.verbs.watch_state import JobReader
from pentad.parallel.record.files import RingFile, write_index
from pentad.parallel.record.ring import Recorder, create
from pentad.parallel.record.stand import axis_members
from pentad.parallel.record.vitals import BEAT_WORD

_OTHER = """
import sys
from pentad.parallel.record.ring import create
recorder = create(sys.argv[1], rank=int(sys.argv[2]), world=8, entries=64)
recorder.vitals.beat()
print(recorder.path, flush=True)
sys.stdin.read()
"""


def _other(stem: str, rank: int) -> tuple[subprocess.Popen[str], str]:
    """A rank that is a process of its own, and its ring."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OTHER, stem, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    """Eight ranks, tp 2 × dp 2 × pp 2: 0 computes, 1 waits, 2 loads data, 3 saves, 4 is stopped, 5 is dead, 6 has
    ended, 7 is on another host."""
    folder, stem, host = tmp_path / "job", f"watch-{os.getpid()}-{tmp_path.name}", socket.gethostname()
    mine: list[Recorder] = [create(stem, rank=rank, world=8, entries=64) for rank in (0, 1, 2, 3, 6)]
    for recorder in mine:
        for axis, ranks in (("tp", [0, 1]), ("cp", [0]), ("dp", [0, 2]), ("pp", [0, 4])):
            recorder.intern(axis_members(axis, ranks))
        recorder.step, recorder.op = 16, 1
        recorder.vitals.enter("step")
        recorder.vitals.beat()
        recorder.enter(recorder.intern("F"))
    _, one, two, three, six = mine
    ticket = one.enter(one.intern("all_reduce"), axis=one.intern("tp"), group=0, nbytes=4096, seq=7)
    one.waits(ticket)
    two.vitals.enter("data")
    three.vitals.enter("save")
    six.close()
    stopped, stopped_ring = _other(stem, 4)
    dead, dead_ring = _other(stem, 5)
    dead.kill()
    dead.wait()
    stopped.send_signal(signal.SIGSTOP)
    with open(stopped_ring, "r+b") as ring:  # silent for long enough
        ring.seek(8 * BEAT_WORD)
        ring.write((time.monotonic_ns() - 60 * 10**9).to_bytes(8, "little"))
    rings = [RingFile(r.rank, host, str(r.path), os.getpid()) for r in mine]
    rings += [RingFile(4, host, stopped_ring, stopped.pid), RingFile(5, host, dead_ring, dead.pid)]
    write_index(folder, [*rings, RingFile(7, "elsewhere", "/dev/shm/pentad-x-7.ring", 1)])
    (folder / "program.json").write_text("{}")
    row = {
        "step": 16,
        "loss": 2.5,
        "mfu": 0.41,
        "tokens_per_s": 1234.0,
        "step_time_s": 0.5,
        "waterfall": {"model": 0.4},
    }
    (folder / "metrics.jsonl").write_text(
        json.dumps(row | {"step": 15}) + "\n" + json.dumps(row) + '\n{"step": 17, "lo'
    )
    os.utime(folder / "metrics.jsonl", (0, time.time() + 600))  # however long the machine takes: just reported
    (folder / "events.jsonl").write_text(json.dumps({"event": "check\x1b[31mpoint", "step": 10, "path": "x"}) + "\n")
    yield folder
    stopped.kill()
    stopped.communicate()
    for path in Path("/dev/shm").glob(f"pentad-{stem}-*.ring"):
        path.unlink()


def test_one_look_on_paper(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in Path("/dev/shm").glob(f"pentad-watch-{os.getpid()}-*.ring")}
    assert main(["watch", str(job), "--once"]) == 0
    out = capsys.readouterr().out
    assert "job  running  8 ranks: tp 2, dp 2, pp 2" in out
    assert "step 16   loss 2.5000   MFU 41.00%   1.23K tok/s   0.5 s/step" in out and "where  model 40.0%" in out
    grid = {name: cells for name, cells in re.findall(r"^(pp \d dp \d) +(.*)$", out, re.M)}
    assert {name: cells.split() for name, cells in grid.items()} == {
        "pp 0 dp 0": ["[", "0", "comp", "]", "1", "~tp"],
        "pp 0 dp 1": ["2", "data", "3", "save"],
        "pp 1 dp 0": ["4", "STOP", "5", "DEAD"],
        "pp 1 dp 1": ["6", "done", "7", "steps"],
    }
    assert "rank 0 on" in out and "computing, in step 17" in out
    assert "1 waiting for tp (~tp)" in out and "1 stepping elsewhere" in out
    assert "\x1b" not in out and "step 10  check" in out
    assert {path: path.read_bytes() for path in before} == before, "it has written into a ring"


def test_ranks_of_other_hosts_by_the_files_of_the_run(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown() -> tuple[str, str]:
        view = JobReader(job).look()
        return view.state(7).name, plain_text(screen_lines(view, 7))

    metrics, events = job / "metrics.jsonl", job / "events.jsonl"
    os.utime(metrics, (0, time.time() + 600))  # of a file system whose clock is ahead
    state, text = shown()
    assert state == "STEPS" and "rank 7 on elsewhere: stepping elsewhere, its last step is 16, reported 0 s ago" in text
    os.utime(metrics, (0, time.time() - 3600))
    state, text = shown()
    assert state == "QUIET" and "no step for long, its last step is 16, reported 36" in text
    for ranks, expected in (([7], "BLAMED"), ([5], "LOST")):
        said = {"event": "verdict", "kind": "killed", "ranks": ranks, "line": f"rank {ranks[0]} was killed"}
        events.write_text(json.dumps({"event": "start", "step": 0}) + "\n" + json.dumps(said) + "\n")
        state, text = shown()
        assert state == expected and f"rank {ranks[0]} was killed" in text
    events.write_text(json.dumps({"event": "end", "step": 16}) + "\n")
    assert shown()[0] == "DONE"
    metrics.unlink()
    events.unlink()
    assert shown()[0] == "QUIET"


def test_on_a_host_without_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_index(tmp_path, [RingFile(rank, f"node{rank}", f"/dev/shm/pentad-x-{rank}.ring", 1) for rank in range(2)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5, "step_time_s": 50}\n')
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "running  2 ranks" in out and "2 stepping elsewhere" in out and "rank 0 on node0" in out


def _read(terminal: int, until: str, seconds: float = 60.0) -> str:
    """What a terminal gets, without control sequences, until a text is in it."""
    text, end = "", time.monotonic() + seconds
    while until not in (shown := re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|\([AB0]|[=>])|\x0f", "", text)):
        assert time.monotonic() < end, f"{until!r} did not come: {shown}"
        if select.select([terminal], [], [], 1.0)[0]:
            text += os.read(terminal, 1 << 16).decode(errors="replace")
    return shown


def test_in_a_terminal(job: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "110", "LINES": "30"}
        os.execv(sys.executable, [sys.executable, "-m", "pentad.launch.cli", "watch", str(job)])
    try:
        shown = _read(terminal, "q: quit")
        assert "DEAD" in shown and "STOP" in shown and "rank 0 on" in shown
        os.write(terminal, b"\x1bOC")  # to the right
        _read(terminal, "all_reduce over tp (number 7, 4096 bytes)")
        os.write(terminal, b"q")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(terminal)


@pytest.mark.distributed
def test_of_a_run_that_has_ended(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(small_run)]) == 0
    out = capsys.readouterr().out
    assert "demo  ended  2 ranks: pp 2" in out and "2 done" in out and "step 45   loss" in out
    assert main(["diagnose", str(small_run)]) == 0


def test_without_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "no record of a run can be read there" in capsys.readouterr().err
