"""Faults of real processes that are mended: all that `pentad train` starts, with stand-ins for ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pentad.launch.supervise.supervisor import processes
from pentad.trainer.recovery.plan import EpochPlan

ROOT = Path(__file__).resolve().parents[3]
_LAUNCH = """
import os, sys
from pathlib import Path
from pentad.launch.supervise.supervisor import keep_record, supervise
folder, spares = Path(sys.argv[1]), int(sys.argv[2])
command = ["tests.launch.supervise.members", str(folder), sys.argv[3]]
code = supervise(folder, 3, command, dict(os.environ), watch=True, spares=spares)
keep_record(folder / "run", folder)
sys.exit(code)
"""


@dataclass
class Job:
    """A job of three ranks that is under way."""

    folder: Path
    launcher: subprocess.Popen[str]
    noted: dict[str, float] = field(default_factory=dict)

    def pid(self, number: int) -> int:
        """Of a process of the job, once it is there."""
        self.until(lambda: number in processes(self.folder), f"process {number} is there")
        return processes(self.folder)[number].pid

    def step(self) -> int:
        """The newest one that was done."""
        return max((int(file.name) for file in (self.folder / "stepped").glob("*")), default=0)

    def comes_to(self, step: int) -> None:
        """Waits for a step."""
        self.until(lambda: self.step() >= step, f"step {step} is done")

    def plan(self, epoch: int) -> EpochPlan:
        """Waits for the plan of an epoch."""
        self.until((self.folder / f"plan.{epoch}").exists, f"there is a plan {epoch}")
        return EpochPlan.load((self.folder / f"plan.{epoch}").read_bytes())

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Waits for something."""
        end = time.monotonic() + 60
        while not holds():
            assert self.launcher.poll() is None, f"the job ended before {what}: {self.launcher.communicate()}"
            assert time.monotonic() < end, f"never: {what}"
            time.sleep(0.005)

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, and what it said on standard error."""
        _, errors = self.launcher.communicate(timeout=60)
        return self.launcher.returncode, errors.splitlines()

    def events(self) -> list[dict[str, object]]:
        """What the watcher wrote."""
        file = self.folder / "run" / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts a job."""
    jobs: list[Job] = []

    def launch(spares: int, steps: int) -> Job:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-c", _LAUNCH, str(tmp_path), str(spares), str(steps)]
        pipe = subprocess.PIPE
        jobs.append(Job(tmp_path, subprocess.Popen(command, env=environment, stderr=pipe, text=True, cwd=ROOT)))
        return jobs[-1]

    yield launch
    for job in jobs:
        if job.launcher.poll() is None:
            job.launcher.kill()
            job.launcher.communicate()
    assert not [process for process in processes(tmp_path).values() if process.alive]
    assert not list(Path("/dev/shm").glob(f"pentad-members-{tmp_path.name}-*"))


@pytest.mark.distributed
def test_a_spare_takes_the_place_of_a_killed_rank_and_then_a_new_process_does(start: Callable[..., Job]) -> None:
    job = start(1, 150)
    job.comes_to(5)
    job.pid(3)  # the spare
    killed = time.time()
    os.kill(job.pid(0), signal.SIGKILL)
    plan = job.plan(1)
    assert (plan.members, plan.lost, plan.rung) == ((3, 1, 2), (0,), "spare")
    assert plan.seen - killed < 2
    job.comes_to(job.step() + 5)
    for number in (1, 3):
        os.kill(job.pid(number), signal.SIGKILL)
    job.comes_to(job.step() + 5)
    plan = job.plan(2)
    code, errors = job.end()
    assert code == 0, errors
    assert set(plan.lost) <= {1, 3} and errors[0].startswith("fault: rank 0 was killed by SIGKILL")
    faults = [event for event in job.events() if event["event"] == "fault"]
    assert faults[0]["kind"] == "killed" and faults[0]["ranks"] == [0] and faults[0]["rung"] == "spare"
    assert sorted(file.name for file in (job.folder / "run" / "record").glob("rank-00000*.ring"))
