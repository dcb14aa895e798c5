"""Starting ranks, stopping them, and telling why they failed; real processes under torchrun's agent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pentad.configs import UserError, load
from pentad.configs.strict_json import expect_int, expect_object, read_json
from pentad.launch.cli import main
from pentad.launch.supervise import launcher as launch
from pentad.launch.supervise.supervisor import supervise
from pentad.launch.supervise.worker_files import processes
from pentad.parallel.comm.process_ids import ProcessId
from pentad.trainer.__main__ import main as run_rank
from pentad.trainer.devices import visible as devices
from tests.jobs import DENSE

_POPEN = subprocess.Popen
ROOT = Path(__file__).resolve().parents[3]


def _supervise(folder: Path, how: str) -> int:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return supervise(folder, 2, ["tests.launch.supervise.workers", str(folder), how], environment)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_ranks_finish_and_the_job_succeeds(tmp_path: Path, number: signal.Signals) -> None:
    def send_when_ready() -> None:
        for _ in range(600):
            if len(list(tmp_path.glob("pid.*[0-9]"))) == 2:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.05)

    threading.Thread(target=send_when_ready, daemon=True).start()
    assert _supervise(tmp_path, "train") == 0
    assert sorted(file.name for file in tmp_path.glob("saved.*")) == ["saved.0", "saved.1"]


@pytest.mark.distributed
def test_the_first_failing_rank_is_shown_and_only_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _supervise(tmp_path, "fail") == 1
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1] == "error: rank 1 of 2 failed: ArithmeticError: cause on 1"
    assert "cause on 0" not in err


@pytest.mark.distributed
def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _supervise(tmp_path, "die") == 128 + signal.SIGKILL
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: rank 1 was killed by SIGKILL")


@pytest.mark.distributed
def test_a_killed_rank_is_named_although_another_had_to_be_killed_after_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pentad.launch.supervise.supervisor.GRACE_S", 0.5)
    assert _supervise(tmp_path, "outlive") == 128 + signal.SIGKILL
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: rank 1 was killed by SIGKILL")


@pytest.mark.distributed
def test_what_the_watcher_says_comes_first_and_ends_the_job_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    assert _supervise(tmp_path, "judged") == 1
    assert time.monotonic() - begin < 60
    assert capfd.readouterr().err.splitlines() == ["error: rank 1 has not come on for 60.0 s", "  rank 0: waited"]
    assert not any(process.alive for process in processes(tmp_path).values())


@pytest.mark.distributed
def test_a_rank_that_has_not_announced_itself_is_ended_with_the_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _supervise(tmp_path, "unannounced") == 1
    assert capfd.readouterr().err.splitlines() == ["error: rank 1 has not come on for 60.0 s"]
    begun = expect_object(read_json(tmp_path / "begun.0"), "a process", ("pid", "started", "boot"))
    assert not ProcessId(expect_int(begun["pid"], "pid"), expect_int(begun["started"], "started")).alive


@pytest.mark.distributed
@pytest.mark.parametrize(("module", "words"), [("agent", "torchrun's agent"), ("fork_server", "fork server")])
def test_ranks_save_and_are_waited_for_when_what_started_them_is_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, words: str
) -> None:
    started: list[subprocess.Popen[Any]] = []

    def remembered(command: list[str], **named: Any) -> subprocess.Popen[Any]:
        process = _POPEN(command, **named)
        started.extend([process] if f"pentad.launch.supervise.{module}" in command else [])
        return process

    def kill_when_ready() -> None:
        for _ in range(600):
            if len(list(tmp_path.glob("pid.*[0-9]"))) == 2:
                started[0].kill()
                return
            time.sleep(0.05)

    monkeypatch.setattr("pentad.launch.supervise.supervisor.subprocess.Popen", remembered)
    threading.Thread(target=kill_when_ready, daemon=True).start()
    assert _supervise(tmp_path, "orphan") == 128 + signal.SIGKILL
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line and "killed by SIGKILL" in line and "checkpoint.resume=latest" in line
    assert sorted(file.name for file in tmp_path.glob("saved.*")) == ["saved.0", "saved.1"]


@pytest.mark.distributed
def test_a_job_that_is_stopped_saves_and_goes_on_where_it_was(tmp_path: Path) -> None:
    job = ["train", "demo", "train.steps=400", "model.layers=1", "train.seq_len=32", "parallel.cp=1"]
    job += ["parallel.ep=2", "eval.every=0"]
    command = [sys.executable, "-m", "pentad.launch.cli", *job, f"runs_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in _until(tmp_path / "demo" / "metrics.jsonl"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "layout: tp 2 × pp 2 × dp 1 (zero1) = 4 ranks" in out
    assert "experts: 8, 2 per token, in 1 of 1 layers; etp 1 × ep 2 × edp 1, all_to_all" in out
    events = [json.loads(line) for line in (tmp_path / "demo" / "events.jsonl").read_text().splitlines()]
    stopped = next(event for event in events if event["event"] == "stopped")
    assert 0 < stopped["step"] < 400
    assert (tmp_path / "demo" / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()


def _until(file: Path) -> Iterator[None]:
    """Polls until the file has something in it, for a minute at most."""
    for _ in range(600):
        if file.exists() and file.stat().st_size:
            return
        yield
        time.sleep(0.1)
    raise TimeoutError(f"{file} stayed empty")


def test_ranks_and_gpus_are_counted_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load(DENSE, ["parallel.tp=4", "parallel.dp=2", "model.heads=4"])
    assert launch.world_size(cfg) == 8
    monkeypatch.setattr(devices, "_DRIVERS", ())
    assert launch.uses_gpus(cfg, 8) is False
    with pytest.raises(UserError, match=r"needs 8 GPUs and 0 are visible"):
        launch.uses_gpus(load(DENSE, ["parallel.tp=4", "train.device=cuda"]), 8)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    assert main(["train", DENSE, "train.device=cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_are_shared_out_and_the_users_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cores", lambda: 16)
    for name in ("OMP_NUM_THREADS", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert launch.rank_environment(4, cuda=False)["OMP_NUM_THREADS"] == "4"
    assert launch.rank_environment(32, cuda=False)["OMP_NUM_THREADS"] == "1"
    assert "mmap_threshold" in launch.rank_environment(4, cuda=False)["GLIBC_TUNABLES"]
    assert "GLIBC_TUNABLES" not in launch.rank_environment(4, cuda=True)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    environment = launch.rank_environment(4, cuda=False)
    assert (environment["OMP_NUM_THREADS"], environment["GLIBC_TUNABLES"]) == ("3", "glibc.malloc.check=1")


@pytest.mark.parametrize(("rank", "printed"), [("0", 1), ("1", 0)])
def test_a_wrong_config_under_another_launcher_is_reported_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, printed: int
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert run_rank(["demo", "train.stesp=3"]) == 2
    assert capsys.readouterr().err.count("error: train.stesp") == printed
    assert main(["train", "demo", "train.stesp=3"]) == 2  # joins the launcher's ranks instead of starting its own
    assert capsys.readouterr().err.count("error: train.stesp") == printed


@pytest.mark.distributed
def test_torchrun_reports_a_wrong_config_once(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = ["-m", "pentad.trainer", "demo", "train.stesp=3"]
    done = subprocess.run([*torchrun, *job], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0
    assert sum(line.startswith("error: train.stesp") for line in done.stderr.splitlines()) == 1
