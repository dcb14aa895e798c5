"""Jobs on a real SLURM of four emulated nodes: submitted, preempted, requeued, gone on with; a node that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pentad.trainer.checkpoint.names import checkpoints
from tests.jobs import DENSE
from tests.launch.supervise.whole_jobs import RECOVER, events, kill, spares, until_step
from tests.slurm.cluster import Cluster, can_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(can_run()), reason=can_run()),
]
STEPS = 240
"""Enough that a job still trains when its spares are ready and its node is gone: 25 s."""
_JOB = [
    "name=a job", "parallel.tp=2", "parallel.dp=2", "train.micro_batch=1", "train.global_batch=2", "train.seq_len=32",
    "model.layers=2", "model.hidden=32", "model.ffn=64", "train.dtype=fp64", "hardware.peak_tflops=0.05",
    f"train.steps={STEPS}", "checkpoint.every=10", "eval.every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("slurm"), 4)
    try:
        try:
            found.start()
        except (OSError, subprocess.SubprocessError, TimeoutError) as error:
            pytest.skip(f"SLURM's daemons do not come up here: {error}")
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the job on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    alone = [*_JOB, "parallel.tp=1", "parallel.dp=1", f"runs_dir={folder}", "checkpoint.every=0"]
    _pentad({**os.environ, "OMP_NUM_THREADS": "1"}, folder, "train", DENSE, *alone)
    return _losses(folder / "a job")


def _pentad(environment: dict[str, str], work: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pentad.launch.cli", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [loss for _, loss in sorted({row["step"]: row["loss"] for row in rows}.items())]


class _Job:
    """A job of a test in the queue."""

    def __init__(self, cluster: Cluster, work: Path, *more: str) -> None:
        self._cluster, self._work, self._more = cluster, work, more
        self._environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
        self._slurm("--nodes", "4", "--ranks-per-node", "1", "--notice", "0", "--submit")
        self.run = work / "runs" / "a job"
        self.folder = self.run / "slurm" / "0001"
        self.number = (self.folder / "job").read_text().strip()

    def _slurm(self, *options: str) -> str:
        return _pentad(self._environment, self._work, "slurm", DENSE, *_JOB, *self._more, *options)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind."""
        return events(self.run, kind)

    def saved(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(checkpoints(self.run / "checkpoints"))

    def until(self, holds: Callable[[], bool], seconds: float = 300.0) -> None:
        """Waits."""
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, self.said()
            # A requeued job waits for two minutes, which says nothing about it.
            self._cluster.ask("scontrol", "update", f"JobId={self.number}", "StartTime=now")
            time.sleep(0.5)

    def state(self) -> str:
        """What SLURM says."""
        return self._cluster.ask("squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T")

    def said(self) -> str:
        """What became of it."""
        files = [self.folder / name for name in ("job.log", "rank-0.log")]
        return "\n".join(file.read_text()[-3000:] for file in files if file.exists())


def test_a_job_is_preempted_requeued_and_goes_on_with_the_same_curve(
    cluster: Cluster, undisturbed: list[float], tmp_path: Path
) -> None:
    job = _Job(cluster, tmp_path)
    job.until(job.saved)
    cluster.ask("scancel", "--signal=USR1", job.number)  # as before the limit
    job.until(lambda: job.state() == "COMPLETED")
    said = job.said()
    assert "back into the queue: stopped and saved" in said and "start 1: done" in said
    assert _losses(job.run) == pytest.approx(undisturbed, rel=1e-11)


def test_a_job_whose_node_dies_goes_on(cluster: Cluster, undisturbed: list[float], tmp_path: Path) -> None:
    job = _Job(cluster, tmp_path)
    job.until(job.saved)
    cluster.kill_node(2)
    job.until(lambda: job.state() != "RUNNING" or "fault" in job.said())
    cluster.start_node(2)  # repaired
    job.until(lambda: job.state() == "COMPLETED")
    assert _losses(job.run) == pytest.approx(undisturbed, rel=1e-11)


def test_a_job_outlives_a_node_where_it_runs(cluster: Cluster, undisturbed: list[float], tmp_path: Path) -> None:
    job = _Job(cluster, tmp_path, *RECOVER)
    job.until(job.saved)
    job.until(lambda: len(spares(job.run)) >= 4)
    cluster.kill_node(2)
    try:
        job.until(lambda: bool(job.events("recovered")) or job.state() != "RUNNING")
        recovered = [(each["lost"], each["rung"], each["from"]) for each in job.events("recovered")]
        assert recovered == [([2], "spare", "snapshots")], job.said()
        job.until(lambda: job.state() == "COMPLETED")
    finally:
        cluster.start_node(2)  # repaired; the tests after this one need it
    said = job.said()  # srun may, or may not, end badly for the tasks of the node that was lost
    assert "start 0: the job went on without ranks that were lost" in said or "start 0: done" in said
    assert "start 1" not in said
    assert [event["step"] for event in job.events("start")] == [0]
    assert _losses(job.run) == pytest.approx(undisturbed, rel=1e-11)
    job.until(lambda: cluster.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "4")


def test_a_cancelled_job_saves_and_stays_away(cluster: Cluster, tmp_path: Path) -> None:
    job = _Job(cluster, tmp_path)
    job.until(job.saved)
    assert "saves and leaves" in job._slurm("--cancel")
    job.until(lambda: job.state() in ("COMPLETED", "CANCELLED"))
    assert "cancelled, and saved" in job.said() and "back into the queue" not in job.said()


@pytest.mark.parametrize("recovers", [False, True], ids=["undisturbed", "a killed rank is replaced"])
def test_ranks_need_no_torchrun_under_srun(
    cluster: Cluster, undisturbed: list[float], tmp_path: Path, recovers: bool
) -> None:
    more, run = RECOVER if recovers else [], tmp_path / "runs" / "a job"
    command = ["srun", "-N4", "--ntasks-per-node=1", sys.executable, "-m", "pentad.trainer", DENSE, *_JOB, *more]
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        if recovers:
            until_step(run, 5, process)
            kill(run, 3)
        assert process.wait(timeout=300) == 0
    finally:
        process.send_signal(signal.SIGKILL)
    assert _losses(run) == pytest.approx(undisturbed, rel=1e-11)
    assert [event["lost"] for event in events(run, "recovered")] == ([[3]] if recovers else [])
