"""One job per run folder, and never two runs in one: locks, what counts as used, what is moved aside."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pentad.configs import Config, UserError, load
from pentad.launch.cli import main as command
from pentad.parallel.comm.process_ids import ProcessId
from pentad.trainer.__main__ import main
from pentad.trainer.processes import run_lock
from pentad.trainer.processes.run_lock import LOCK, STALE_S, Holder, lock_folder
from pentad.trainer.run_folder import RunFile, claim
from tests.jobs import DENSE
from tests.launch.test_bad_input import SMALL
from tests.test_packages import ROOMS, ROOT

_HOLD = """
import sys
from pathlib import Path
from pentad.trainer.processes.run_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]), "name", "go away")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def _other_job(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", _HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def job(tmp_path: Path) -> Config:
    return load(DENSE, [*SMALL, f"runs_dir={tmp_path}", "name=a"])


def _used(run: Path, steps: int = 3, checkpoint: int | None = 2) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s + 1}) + "\n" for s in range(steps)))
    if checkpoint is not None:
        (run / "checkpoints" / f"step-{checkpoint:08d}").mkdir(parents=True)


def _take(job: Config, **how: object) -> ExitStack:
    return claim(job, env={}, **how)  # type: ignore[arg-type]


def _resuming(job: Config, resume: object, **others: object) -> Config:
    return replace(job, checkpoint=replace(job.checkpoint, resume=None if resume is None else str(resume), **others))


def test_a_second_job_in_the_folder_is_told_who_has_it(job: Config, tmp_path: Path) -> None:
    with _other_job(tmp_path / "a") as other:
        with pytest.raises(UserError, match=rf"in use by process {other.pid} on host .* since .*; set another name="):
            _take(job)
        _take(replace(job, name="b")).close()


def test_the_lock_ends_with_its_holder_however_it_goes(job: Config, tmp_path: Path) -> None:
    with _other_job(tmp_path / "a") as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / "a" / LOCK).exists()  # it says so still
        with closing(_take(job)), pytest.raises(UserError, match=f"process {os.getpid()}"):
            _take(job)
        assert not (tmp_path / "a" / LOCK).exists()
        _take(job).close()


def test_another_name_of_the_folder_is_the_same_folder(job: Config, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with closing(_take(job)), pytest.raises(UserError, match="in use"):
        _take(replace(job, name="b"))


def test_jobs_that_share_their_checkpoints_do_not_run_at_once(job: Config, tmp_path: Path) -> None:
    first = _resuming(job, None, dir=str(tmp_path / "shared"))
    with closing(_take(first)), pytest.raises(UserError, match=r"checkpoint.dir: .*shared is in use"):
        _take(replace(first, name="b"))


def _written(folder: Path, holder: Holder, silent_s: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_bytes(holder.text())
    now = time.time()
    os.utime(folder / LOCK, (now - silent_s, now - silent_s))


def test_a_job_on_another_machine_is_believed_while_it_gives_signs(tmp_path: Path) -> None:
    holder = Holder("faraway", ProcessId(12, 34, "its-boot"), 1e9)
    _written(tmp_path / "a", holder, silent_s=STALE_S - 100)
    with pytest.raises(UserError, match=rf"process 12 on host faraway .* remove {tmp_path}/a/.lock, or wait"):
        lock_folder(tmp_path / "a", "name", "set another name=", {})
    _written(tmp_path / "a", holder, silent_s=STALE_S + 100)
    lock_folder(tmp_path / "a", "name", "set another name=", {}).release()


def test_a_job_that_its_launcher_starts_again_takes_over_from_itself(tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    _written(tmp_path / "a", Holder("faraway", ProcessId(12, 34, "its-boot"), 1e9, {"SLURM_JOB_ID=7": 0}))
    for other in ({}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "7"}):
        with pytest.raises(UserError, match="faraway"):
            lock_folder(tmp_path / "a", "name", "", other)
    lock_folder(tmp_path / "a", "name", "", env).release()


def test_where_the_file_system_has_no_locks_the_holders_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_flock", lambda fd: None)
    lock = lock_folder(tmp_path / "a", "name", "", {})
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        lock_folder(tmp_path / "a", "name", "", {})
    lock.release()
    me = Holder.current({})
    _written(
        tmp_path / "a", replace(me, process=replace(me.process, started=me.process.started + 1))
    )  # a reused number
    lock_folder(tmp_path / "a", "name", "", {}).release()
    (tmp_path / "a" / LOCK).touch()
    with pytest.raises(UserError, match="a job that has just begun"):
        lock_folder(tmp_path / "a", "name", "", {})


@pytest.mark.parametrize("text", ["", "{", "[" * 9999, '{"host": 3}', "\0" * 100])
def test_a_damaged_lock_of_a_dead_job_is_no_obstacle(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    lock_folder(tmp_path, "name", "", {}).release()


def test_a_lock_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"):
        lock_folder(tmp_path, "name", "", {})
    assert (tmp_path / "precious").read_text() == "text"


def test_a_fresh_run_in_a_used_folder_is_told_what_is_there_and_what_to_do(job: Config, tmp_path: Path) -> None:
    _used(tmp_path / "a")
    with pytest.raises(UserError) as refused:
        _take(job)
    (problem,) = refused.value.problems
    for text in ("3 steps", "step-00000002", "checkpoint.resume=latest", "name=", "--fresh"):
        assert text in str(problem)
    for resume in ("latest", tmp_path / "a" / "checkpoints" / "step-00000002"):
        _take(_resuming(job, resume)).close()
    _used(tmp_path / "other")
    with pytest.raises(UserError, match="holds an earlier run"):  # its metrics would be mixed with those of `other`
        _take(_resuming(job, tmp_path / "other" / "checkpoints" / "step-00000002"))


def test_check_says_before_what_train_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["check", DENSE, *SMALL, f"runs_dir={tmp_path}", "name=a", f"data.cache={tmp_path}/cache"]
    assert command(given) == 0 and "earlier run" not in capsys.readouterr().err
    _used(tmp_path / "a")
    assert command(given) == 0
    assert "holds an earlier run (3 steps, last checkpoint step-00000002)" in capsys.readouterr().err
    assert not list(tmp_path.glob("a.*")) and not (tmp_path / "a" / LOCK).exists()


@pytest.mark.parametrize("left", ["metrics", "checkpoint", "events", "garbage", "link"])
def test_any_trace_of_steps_makes_a_folder_used(job: Config, tmp_path: Path, left: str) -> None:
    run = tmp_path / "a"
    run.mkdir()
    match left:
        case "metrics":
            _used(run, checkpoint=None)
        case "checkpoint":
            _used(run, steps=0)
        case "events":
            (run / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "evaluation", "step": 2}\n')
        case "garbage":
            (run / "metrics.jsonl").write_bytes(b"\xff\xfe{[1e999")
        case "link":
            (run / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="holds an earlier run"):
        _take(job)


def test_a_run_that_failed_before_its_first_step_has_not_used_its_folder(job: Config, tmp_path: Path) -> None:
    run = tmp_path / "a"
    (run / "checkpoints").mkdir(parents=True)
    (run / "record").mkdir()
    for name in ("config.yaml", "config.resolved.yaml", "metrics.jsonl", "program.json"):
        (run / name).write_text("")
    (run / "events.jsonl").write_text('{"event": "start", "step": 0}\n')
    _take(job).close()
    _take(job, fresh=True).close()
    assert not (tmp_path / "a.1").exists()


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(job: Config, tmp_path: Path) -> None:
    for number in (1, 2):
        _used(tmp_path / "a", steps=number)
        with closing(_take(job, fresh=True)):
            assert [p.name for p in (tmp_path / "a").iterdir()] == [LOCK]
            with pytest.raises(UserError, match="in use"):
                _take(job)
        assert len((tmp_path / f"a.{number}" / "metrics.jsonl").read_text().splitlines()) == number
        assert not (tmp_path / f"a.{number}" / LOCK).exists()
    assert (tmp_path / "a.1" / "checkpoints" / "step-00000002").is_dir()


def test_fresh_moves_checkpoints_elsewhere_aside_and_nothing_else_there(job: Config, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "step-00000007").mkdir(parents=True)
    (shared / "precious").touch()
    elsewhere = _resuming(job, None, dir=str(shared))
    with pytest.raises(UserError, match=r"checkpoint.dir: .*step-00000007.*set another checkpoint.dir="):
        _take(elsewhere)
    _take(elsewhere, fresh=True).close()
    assert sorted(p.name for p in shared.iterdir()) == ["before.1", "precious"]
    assert (shared / "before.1" / "step-00000007").is_dir()


def test_fresh_does_not_move_what_the_job_needs(job: Config, tmp_path: Path) -> None:
    _used(tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000002"
    config = tmp_path / "a" / "config.yaml"
    config.touch()
    with pytest.raises(UserError, match=r"checkpoint.resume: .*--fresh moves aside"):
        _take(_resuming(job, checkpoint), fresh=True)
    with pytest.raises(UserError, match=r"checkpoint.init: .*--fresh moves aside"):
        _take(_resuming(job, None, init=str(checkpoint)), fresh=True)
    with pytest.raises(UserError, match=r"CONFIG: .*--fresh moves aside"):
        _take(job, fresh=True, config=config)
    assert checkpoint.is_dir()


def test_fresh_is_over_when_the_launcher_starts_the_job_again(job: Config, tmp_path: Path) -> None:
    _used(tmp_path / "a")
    env = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1"}
    claim(_resuming(job, "latest"), fresh=True, env=env).close()
    assert (tmp_path / "a" / "metrics.jsonl").exists() and not (tmp_path / "a.1").exists()


def test_a_run_that_goes_on_appends_and_one_that_starts_again_does_not_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = [DENSE, *SMALL, f"runs_dir={tmp_path}", "name=a"]
    assert main([*job, "train.steps=1"]) == 0
    assert main([*job, "train.steps=2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*job, "train.steps=2", "checkpoint.resume=latest"]) == 0
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 2
    assert main([*job, "train.steps=1", "--fresh"]) == 0
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "a.1" / "metrics.jsonl").read_text().splitlines()) == 2
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000001"]


def test_every_file_name_of_a_run_is_written_once() -> None:
    names = {str(name) for name in RunFile if "." in name}
    owners = {"run_folder.py", "paths.py"}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            texts = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
            assert file.name in owners or not texts & names, file


def test_a_run_folder_needs_no_torch() -> None:
    code = "import sys, pentad.trainer.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
