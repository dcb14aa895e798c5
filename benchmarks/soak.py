"""A job that faults happen to again and again: how much of its time trains, what is left, and the bits at its end.

    python benchmarks/soak.py
    python benchmarks/soak.py --minutes 3 --every 10 --seed 1

Four ranks (tp 2 × dp 2, `zero1`) train under `pentad train` with one spare, and a step takes a tenth of a second more
than it needs. Faults come at random times: one rank is killed, two at once are, one is stopped, a spare is killed. In
the end the job is asked to stop and saves; then the same steps are done without pace and faults, and the two
checkpoints are compared bit by bit.

`effective` is the share of the time from the first step to the last that went into steps that were done once: wall
clock less, for each fault, the time from it to the first operation afterwards and what was done again. Processes,
threads, descriptors and shared memory are counted in quiet moments: the largest number in the first third beside the
largest in the last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faulty_job import WAIT_S, FaultyJob

from pentad.trainer.checkpoint.io import read_full
from pentad.trainer.checkpoint.names import checkpoints

RANKS = 4
KINDS = {"kill": 5, "two": 2, "stop": 2, "spare": 1}
"""What happens, and how often of ten times."""
_QUIET_S = 4.0
"""From one fault that is mended to the next at least: what is to be mended is one fault."""
JOB = {
    "model": {"layers": 2, "hidden": 64, "ffn": 176, "heads": 4, "kv_heads": 4, "vocab": 320},
    "parallel": {"tp": 2, "dp": 2, "data": {"sharding": "zero1"}},
    "train": {"steps": 1_000_000, "seq_len": 64, "global_batch": 8, "micro_batch": 2, "dtype": "fp32"},
    "data": {"name": "stdlib"},
    "log": {"every": 100},
    "eval": {"every": 0},
}


@dataclass
class Soaked:
    """What became of a job.

    Args:
        faults: those that were made, by kind.
        steps: that it did.
        seconds: from the first of them to the last.
        mended: events of those that were mended.
        held: what there was in quiet moments, by name.
        left: what was still there at the end.
        problems: what should not have been.
    """

    faults: list[str] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    mended: list[dict[str, Any]] = field(default_factory=list)
    held: dict[str, list[int]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def effective(self) -> float:
        """Share of the time that went into steps that count."""
        step_s = self.seconds / max(self.steps, 1)
        lost = sum(each["ms"] / 1e3 + each["redone"] * step_s for each in self.mended)
        return 1 - lost / self.seconds


def counted(job: FaultyJob) -> dict[str, int]:
    """What the processes of a job hold, and what they have in shared memory."""
    found = {"processes": 0, "threads": 0, "descriptors": 0, "shared memory": len(shared())}
    for pid in job.family():
        with contextlib.suppress(OSError):
            found["threads"] += len(list(Path(f"/proc/{pid}/task").iterdir()))
            found["descriptors"] += len(list(Path(f"/proc/{pid}/fd").iterdir()))
            found["processes"] += 1
    return found


def shared() -> set[str]:
    """Names in the machine's shared memory."""
    return {each.name for each in Path("/dev/shm").iterdir()}


def faults(seed: int, every: float, seconds: float) -> Iterator[tuple[float, str, random.Random]]:
    """When something happens, from the start, what, and how to draw to whom."""
    draws, at = random.Random(seed), 0.0
    while True:
        at += max(_QUIET_S, draws.expovariate(1 / every))
        if at > seconds - _QUIET_S:
            return
        yield at, draws.choices(list(KINDS), list(KINDS.values()))[0], draws


def strike(job: FaultyJob, kind: str, draws: random.Random) -> bool:
    """Makes a fault happen; whether one is to be mended."""
    ranks = job.ranks()
    slots = draws.sample(sorted(ranks), 2 if kind == "two" else 1)
    if kind == "spare":
        for pid in sorted(job.spares(ranks))[:1]:
            os.kill(pid, signal.SIGKILL)
        return False
    for slot in slots:
        os.kill(ranks[slot], signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    return True


def soak(folder: Path, minutes: float, every: float, seed: int) -> Soaked:
    """Runs the job with faults."""
    found, before = Soaked(), shared()
    keys = ("faults.recover=true", "faults.spares=1", "faults.alive_s=2", "checkpoint.every=0")
    job = FaultyJob(folder, "soak", JOB, "--import", "soak_pace", *keys)
    if not job.until(lambda: job.step() > 5, 3 * WAIT_S):
        found.problems.append("it did not begin")
        return found
    began, first = time.monotonic(), job.step()
    for at, kind, draws in faults(seed, every, 60 * minutes):
        time.sleep(max(0.0, began + at - time.monotonic()))
        if job.process.poll() is not None:
            break
        for name, number in counted(job).items():
            found.held.setdefault(name, []).append(number)
        mended = sum(event["event"] == "recovered" for event in job.events())
        to_mend = strike(job, kind, draws)
        found.faults.append(kind)
        step = job.step()
        if to_mend and not job.until(lambda: _recovered(job) > mended):  # noqa: B023
            found.problems.append(f"{kind} in step {step} was not mended")
        job.until(lambda: job.step() > step + 2)  # noqa: B023
        print(f"{at:7.1f} s  step {job.step():6d}  {kind}", flush=True)
    found.steps, found.seconds = job.step() - first, time.monotonic() - began
    code = job.stop()
    if code:
        found.problems.append(f"it ended with {code}")
    found.mended = [event for event in job.events() if event["event"] == "recovered"]
    job.until(lambda: not job.family() and shared() <= before, 10)
    found.left = [*(f"process {pid}" for pid in job.family()), *sorted(shared() - before)]
    return found


def _recovered(job: FaultyJob) -> int:
    return sum(event["event"] == "recovered" for event in job.events())


def differing(folder: Path) -> list[str]:
    """The same steps without faults, and the tensors that are not the same bits."""
    [(_, saved)] = checkpoints(folder / "soak" / "checkpoints")[-1:]
    tensors, about = read_full(saved)
    step = int(about["step"])
    calm = FaultyJob(folder, "calm", JOB, f"checkpoint.every={step}")
    wanted = folder / "calm" / "checkpoints" / saved.name
    calm.until(lambda: wanted.exists(), 3600)
    calm.stop()
    others, _ = read_full(wanted)
    return [name for name, value in tensors.items() if name not in others or not torch.equal(value, others[name])]


def _told(found: Soaked, differ: list[str]) -> str:
    third = max(1, len(next(iter(found.held.values()), [])) // 3)
    kinds = ", ".join(f"{found.faults.count(kind)} {kind}" for kind in KINDS)
    ms = sorted(each["ms"] for each in found.mended) or [0.0]
    redone = sum(each["redone"] for each in found.mended)
    lines = [
        f"{len(found.faults)} faults ({kinds}) in {found.seconds / 60:.1f} min, {found.steps} steps",
        f"effective {found.effective:.2%}; {len(ms)} mended, median {ms[len(ms) // 2]:.0f} ms, most {ms[-1]:.0f}",
        f"steps done again: {redone}",
        *(
            f"{name}: at most {max(held[:third])} at first, {max(held[-third:])} at last"
            for name, held in found.held.items()
        ),
        f"left: {', '.join(found.left) or 'nothing'}",
        f"bits: {'the same' if not differ else f'{len(differ)} tensors differ, {differ[0]} first'}",
        *found.problems,
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=20, help="seconds between two faults on average")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = soak(Path(scratch), wanted.minutes, wanted.every, wanted.seed)
        differ = differing(Path(scratch)) if not found.problems else ["not compared"]
        print(_told(found, differ), flush=True)
        if found.problems or found.left or differ:
            print((Path(scratch) / "soak.out").read_text()[-4000:])
            sys.exit(1)


if __name__ == "__main__":
    main()
