"""How real ranks end: killed, signalled, orphaned; under torchrun and without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pentad.trainer.checkpoint.names import checkpoints
from pentad.trainer.processes.failure import (
    drop_unfinished_failure,
    failure_file,
    failure_of,
    read_failure,
    write_failure,
)
from tests.jobs import DENSE
from tests.launch.test_bad_input import SMALL

_JOB = ["-m", "pentad.trainer", DENSE, *SMALL, "name=a", "parallel.dp=3", "train.global_batch=3", "train.steps=100000"]


@contextmanager
def _training(
    commands: list[list[str]], envs: list[dict[str, str]], run: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a job that has done its first step."""
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, env in zip(commands, envs, strict=True)
    ]
    try:
        metrics = run / "metrics.jsonl"
        for _ in range(2400):
            if metrics.exists() and metrics.stat().st_size:
                break
            time.sleep(0.05)
        yield started
    finally:
        for process in started:
            process.kill()


def _ranks(run: Path) -> tuple[list[list[str]], list[dict[str, str]]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": "3"}
    facts = [{**where, "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "3"} for r in range(3)]
    return [[*_JOB, f"runs_dir={run.parent}"]] * 3, facts


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_first_and_the_others_leave_and_keep_their_record(tmp_path: Path, killed: int) -> None:
    commands, environments = _ranks(tmp_path / "a")
    with _training(commands, environments, tmp_path / "a") as ranks:
        ranks[killed].send_signal(signal.SIGKILL)
        errors = [rank.communicate(timeout=100)[1].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-9 if r == killed else 1 for r in range(3)]
    # The watcher speaks through the standard error that it has from the first rank; the others say nothing.
    assert errors[0][0].startswith(f"error: rank {killed} was killed by SIGKILL"), errors
    assert [line for line in errors[0] if not line.startswith("  ")] == errors[0][:1]
    assert errors[1:] == [[], []]
    # Of the killed rank as well, and nothing stays in shared memory.
    assert [p.name for p in sorted((tmp_path / "a" / "record").glob("*.ring"))] == [
        f"rank-0000{r}.epoch-0.ring" for r in range(3)
    ]
    assert not list(Path("/dev/shm").glob(f"pentad-a-*-{environments[0]['MASTER_PORT']}-?.ring"))


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize("code", [0, 75])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_rank_that_a_batch_system_warns_stops_the_job_and_it_saves(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    commands, environments = _ranks(tmp_path / "a")
    with _training([[*c, f"faults.stop_code={code}"] for c in commands], environments, tmp_path / "a") as ranks:
        ranks[1].send_signal(number)
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert ([rank.returncode for rank in ranks], errors) == ([code] * 3, ["", "", ""])
    assert checkpoints(tmp_path / "a" / "checkpoints")


@pytest.mark.distributed
def test_ranks_whose_torchrun_is_killed_save_and_end(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", *_JOB, f"runs_dir={tmp_path}"]
    with _training([torchrun], [{}], tmp_path / "a") as (launcher,):
        launcher.send_signal(signal.SIGKILL)
        for _ in range(1000):
            if '"stopped"' in (tmp_path / "a" / "events.jsonl").read_text():
                break
            time.sleep(0.1)
    events = (tmp_path / "a" / "events.jsonl").read_text()
    assert '"checkpoint_saved"' in events and '"stopped"' in events


def test_what_a_killed_rank_had_begun_to_write_down_is_removed_and_that_of_others_is_not(tmp_path: Path) -> None:
    failure = failure_of(RuntimeError("a fault"), rank=1, world=2)
    write_failure(tmp_path, failure)
    folder = failure_file(tmp_path, 1).parent
    for pid in (77, 78):
        (folder / f"rank-00001.failure.{pid}.partial").touch()
    drop_unfinished_failure(tmp_path, 77)
    assert sorted(file.name for file in folder.iterdir()) == [
        "rank-00001.failure.78.partial",
        "rank-00001.failure.json",
    ]
    assert read_failure(tmp_path, 1) == failure
