"""`pentad diagnose`: of runs that are there and of runs that have ended, from what they have left."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from pentad.launch.cli import main
from pentad.parallel.record.diagnosis import Verdict
from pentad.parallel.record.files import RingFile, collect, write_index
from pentad.parallel.record.ring import Recorder, create
from pentad.parallel.record.stand import axis_members


def _run(tmp_path: Path, ranks: int = 2) -> tuple[Path, list[Recorder]]:
    """A run of ranks that all live in this process, and their records."""
    run = tmp_path / "a"
    stem = f"diagnose-{os.getpid()}-{tmp_path.name}"
    recorders = [create(stem, rank=rank, world=ranks, entries=64) for rank in range(ranks)]
    host = socket.gethostname()
    write_index(run, [RingFile(r.rank, host, str(r.path), os.getpid()) for r in recorders])
    return run, recorders


def _call(recorder: Recorder, seq: int, *, wait: bool) -> None:
    recorder.intern(axis_members("dp", [0, 1]))
    ticket = recorder.enter(recorder.intern("all_reduce"), axis=recorder.intern("dp"), group=0, nbytes=64, seq=seq)
    if wait:
        recorder.waits(ticket)
    else:
        recorder.exit(ticket)


@pytest.fixture(autouse=True)
def _rings(tmp_path: Path) -> object:
    yield
    for path in Path("/dev/shm").glob(f"pentad-diagnose-{os.getpid()}-{tmp_path.name}-*.ring"):
        path.unlink()


def _ended(run: Path, recorders: list[Recorder]) -> None:
    """As after the end: copies, and no process."""
    files = [RingFile(r.rank, "elsewhere", str(r.path), os.getpid()) for r in recorders]
    collect(run, files, host="elsewhere", remove=True)
    write_index(run, files)


def test_of_a_run_that_hangs_the_rank_that_others_wait_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, (first, second) = _run(tmp_path)
    _call(first, 0, wait=False)
    _call(second, 0, wait=False)
    _call(first, 1, wait=True)
    time.sleep(0.2)
    assert main(["diagnose", str(run)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("rank 1 on ") and "has not come on" in out[0]
    assert any("rank 0: waited in all_reduce over dp (number 1, 64 bytes)" in line for line in out)
    assert out[-1].startswith("what to do: ")


def test_of_a_run_that_was_killed_who_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, (first, second) = _run(tmp_path)
    _call(second, 0, wait=True)
    second.vitals.failed()
    second.close()
    _ended(run, [first, second])
    (run / "record" / "rank-00001.failure.json").write_text(
        json.dumps(
            {"rank": 1, "world": 2, "at": 1.0, "user": False, "everywhere": False, "lost": True, "told": False}
            | {"lines": ["PeerGone: rank 0 is gone"], "trace": ""}
        )
    )
    assert main(["diagnose", "--json", str(run)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["running"]
    assert (found["verdict"]["kind"], found["verdict"]["ranks"]) == ("killed", [0])


def test_of_a_run_that_ended_well_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, recorders = _run(tmp_path)
    for recorder in recorders:
        recorder.close()
    _ended(run, recorders)
    assert main(["diagnose", str(run)]) == 0
    assert capsys.readouterr().out.startswith("ranks 0-1 ended in good order")


def test_the_watchers_verdict_comes_first_if_it_is_of_this_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recorders = _run(tmp_path)
    for recorder in recorders:
        recorder.close()
    _ended(run, recorders)
    said = Verdict("hang", (1,), "rank 1 has not come on", ("  rank 0: waited",), 7, 1, 4e9)
    (run / "record" / "verdict.json").write_text(json.dumps(said.as_dict()))
    assert main(["diagnose", str(run)]) == 1
    assert "rank 1 has not come on" in capsys.readouterr().out
    old = Verdict("hang", (1,), "rank 1 has not come on", at=1.0)
    (run / "record" / "verdict.json").write_text(json.dumps(old.as_dict()))
    assert main(["diagnose", str(run)]) == 0


def test_without_a_record_it_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "no record of a run can be read there" in capsys.readouterr().err
    run, recorders = _run(tmp_path)
    for recorder in recorders:
        assert recorder.path is not None
        recorder.path.unlink()
    assert main(["diagnose", str(run)]) == 2
    assert "none of the 2 rings" in capsys.readouterr().err
