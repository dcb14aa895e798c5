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

from pentad.launch.supervise.worker_files import processes
from pentad.parallel.comm.processes import children
from pentad.trainer.recovery.plan import EpochPlan
from pentad.trainer.recovery.ways import Ladder, Way

ROOT = Path(__file__).resolve().parents[3]
_SEEN_S = 0.5
_LAUNCH = """
import os, sys
from pathlib import Path
from pentad.launch.supervise.supervisor import keep_record, supervise
folder, spares = Path(sys.argv[1]), int(sys.argv[2])
command = ["tests.launch.supervise.members", str(folder)]
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

    def spare(self, number: int) -> int:
        """Of a process that is ready to take a slot, once the watcher has seen that."""
        self.until((self.folder / f"ready.{number}").exists, f"process {number} is ready")
        time.sleep(_SEEN_S)
        return self.pid(number)

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
        """Its exit code, and what it said on standard error; it does a few more steps."""
        (self.folder / "steps.new").write_text(str(self.step() + 20))
        (self.folder / "steps.new").rename(self.folder / "steps")
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

    def launch(spares: int, ladder: Ladder | None = None) -> Job:
        if ladder is not None:
            (tmp_path / "ladder").write_text(json.dumps(ladder.dump()))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-c", _LAUNCH, str(tmp_path), str(spares)]
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
    job = start(1)
    job.comes_to(5)
    job.spare(3)
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


@pytest.mark.distributed
def test_without_a_spare_new_processes_come_for_a_stopped_one_a_failed_one_and_one_lost_on_its_way(
    start: Callable[..., Job],
) -> None:
    job = start(0)
    job.comes_to(5)
    stopped = job.pid(1)
    os.kill(stopped, signal.SIGSTOP)
    plan = job.plan(1)
    assert (plan.members, plan.lost, plan.rung) == ((0, 3, 2), (1,), "respawn")
    assert not Path(f"/proc/{stopped}/stat").exists() or _state(stopped) == "Z", "it could wake up and write"
    job.comes_to(job.step() + 5)
    (job.folder / f"fail.once.2.{job.step() + 20}").touch()
    plan = job.plan(2)
    assert (plan.members, plan.lost, plan.rung) == ((0, 3, 4), (2,), "respawn")
    os.kill(job.pid(4), signal.SIGKILL)  # in the middle of the recovery
    plan = job.plan(3)
    assert (plan.members, plan.lost) == ((0, 3, 5), (4,))
    job.comes_to(job.step() + 5)
    code, errors = job.end()
    assert code == 0, errors
    faults = [event for event in job.events() if event["event"] == "fault"]
    assert [fault["kind"] for fault in faults] == ["stopped", "failed", faults[2]["kind"]]
    assert "ArithmeticError: bad number in step" in str(faults[1]["line"])
    assert faults[2]["kind"] in ("killed", "ended")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.distributed
def test_a_mesh_shrinks_at_once_and_grows_back_when_a_new_process_is_ready(start: Callable[..., Job]) -> None:
    ways = Way("", "", 3), Way("shrink", "dp=2", 2), Way("shrink", "dp=1", 1)
    job = start(0, Ladder(("spare", "shrink", "respawn"), ways, grow=True))
    job.comes_to(5)
    os.kill(job.pid(2), signal.SIGKILL)
    plan = job.plan(1)
    assert (plan.members, plan.lost, plan.rung, plan.layout) == ((0, 1), (2,), "shrink", "dp=2")
    plan = job.plan(2)
    assert (plan.members, plan.lost, plan.rung, plan.layout) == ((0, 1, 3), (), "grow", "")
    job.comes_to(job.step() + 3)
    for number in (0, 3):  # the run's first one, too, and more than one
        os.kill(job.pid(number), signal.SIGKILL)
    job.until(
        lambda: _newest(job).members == (1, *_newest(job).members[1:]) and len(_newest(job).members) == 3, "grown"
    )
    job.comes_to(job.step() + 3)
    code, errors = job.end()
    assert code == 0, errors
    faults = [event for event in job.events() if event["event"] == "fault"]
    assert faults[0]["rung"] == "shrink" and faults[0]["layout"] == "dp=2"
    assert any("more processes are ready; grow: the job goes on in mesh" in line for line in errors), errors


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_may_end_with_fewer_slots_than_it_began_with(start: Callable[..., Job]) -> None:
    job = start(0, Ladder(("shrink",), (Way("", "", 3), Way("shrink", "dp=1", 1))))
    job.comes_to(5)
    os.kill(job.pid(0), signal.SIGKILL)
    plan = job.plan(1)
    assert (plan.members, plan.lost, plan.spares) == ((1,), (0,), (2,))
    job.comes_to(job.step() + 3)
    os.kill(job.pid(1), signal.SIGKILL)  # whoever was left over takes the place
    assert job.plan(2).members == (2,)
    code, errors = job.end()
    assert code == 0, errors


def _newest(job: Job) -> EpochPlan:
    """The plan of the newest mesh."""
    return job.plan(max(int(file.suffix[1:]) for file in job.folder.glob("plan.*[0-9]")))


@pytest.mark.distributed
def test_an_error_that_comes_again_ends_the_job_with_it_on_top(start: Callable[..., Job]) -> None:
    job = start(0)
    job.comes_to(1)
    (job.folder / f"fail.always.1.{job.step() + 10}").touch()
    code, errors = job.end()
    assert code == 1
    assert errors[0].startswith("fault: rank 1") and "respawn" in errors[0]
    assert "the same error came again in the same step" in errors[1]
    assert errors[2].startswith("Traceback") and errors[-1].startswith("error: rank ")
    assert "ArithmeticError: bad number in step" in errors[-1]
    assert sum(line.startswith("Traceback") for line in errors) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_without_its_watcher_a_job_goes_on_and_its_next_fault_ends_it(start: Callable[..., Job]) -> None:
    job = start(1)
    job.comes_to(5)
    job.spare(3)
    os.kill(_watcher_of(job.launcher.pid), signal.SIGKILL)
    job.until((job.folder / "plan.end").exists, "the ranks know that no plan comes")
    job.comes_to(job.step() + 5)
    os.kill(job.pid(1), signal.SIGKILL)
    code, errors = job.end()
    assert code == 128 + signal.SIGKILL and "rank 1 was killed by SIGKILL" in errors[-1]


def _watcher_of(launcher: int) -> int:
    for child in children(launcher):
        if b"supervise.watcher" in Path(f"/proc/{child.pid}/cmdline").read_bytes():
            return child.pid
    raise AssertionError("there is no watcher")
