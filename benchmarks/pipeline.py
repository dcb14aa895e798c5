"""Pentad's pipeline runtime and torch.distributed.pipelining, in one run, over the same layers and schedule.

    python benchmarks/pipeline.py --processes 2 --schedule 1f1b --dtype fp32 --rounds 3 --steps 5
    python benchmarks/pipeline.py --memory --schedule 1f1b
    python benchmarks/pipeline.py --overhead

Both sides run Pentad's layers (the model of `dense.py`, 8 microbatches of one sequence), head, gradient buckets and
optimizer, one thread a process, and split the layers alike; only who runs the pipeline differs. A step is forward,
backward and update. The ideal is the simulated time of Pentad's program: the median duration of each operation in the
record of Pentad's own steps, without what it waited, and transfers that take no time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from pipeline_worker import CHUNKS, Report

from pentad.launch.supervise.launcher import rank_environment
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.recorded import actual
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.record.reader import read

HERE = Path(__file__).resolve().parent
OURS, THEIRS = "pipeline_worker", "peers.torch_pipelining"
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Largest relative difference of a step's loss between the sides."""


@dataclass(frozen=True)
class Run:
    """What one run of one side left.

    Args:
        reports: one per process.
        program: Pentad's, of the same job.
        ideal_s: Pentad's side only: simulated seconds of a step, from its record.
    """

    reports: list[Report]
    program: Program
    ideal_s: float = math.nan


@dataclass
class Compared:
    """All rounds: seconds of the median step of each."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    ideal: list[float] = field(default_factory=list)


def run_side(module: str, arguments: argparse.Namespace, **changed: object) -> Run:
    """Runs one side under torchrun.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    settings = {name: getattr(arguments, name) for name in ("schedule", "dtype", "microbatches", "warmup", "steps")}
    settings |= changed
    flags = [f"--{name}" for name, value in settings.items() if value is True]
    values = [word for name, value in settings.items() if value is not True for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(arguments.processes), "-m", module, "--out", out, *values, *flags]
        # The malloc thresholds that `pentad train` sets, for both sides.
        environment = rank_environment(arguments.processes, cuda=False) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=3600)
        if done.returncode:
            raise RuntimeError(f"{module} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-6000:]}")
        files = [Path(out) / f"rank-{rank}.json" for rank in range(arguments.processes)]
        reports = [Report(**json.loads(file.read_text())) for file in files]
        program = Program.from_json((Path(out) / "program.json").read_text())
        wanted = module == OURS and not changed
        return Run(reports, program, _ideal(program, Path(out), arguments) if wanted else math.nan)


def _ideal(program: Program, out: Path, arguments: argparse.Namespace) -> float:
    """Simulated seconds of a step of the program, whose record is in `out`."""
    rings = [read(out / f"rank-{rank}.ring") for rank in range(arguments.processes)]
    spans: list[tuple[int, Op, float, float]] = []
    for step in range(arguments.warmup, arguments.warmup + arguments.steps):
        timeline = actual(program, rings, step)
        for rank, (ops, times) in enumerate(zip(program.ranks, timeline.spans, strict=True)):
            spans += [(rank, op, start, end) for op, (start, end) in zip(ops, times, strict=True)]
    return simulate(program, Times.from_spans(spans, program.placement)).makespan


def check_losses(ours: Run, theirs: Run, tolerance: float) -> None:
    """Raises ValueError where the sides did not train alike."""
    pairs = list(zip(ours.reports[0].losses, theirs.reports[0].losses, strict=True))
    for step, (a, b) in enumerate(pairs):
        if not math.isclose(a, b, rel_tol=tolerance):
            raise ValueError(f"step {step}: Pentad's loss is {a}, torch's {b}")


def compare(arguments: argparse.Namespace) -> Compared:
    """Both sides once a round, in turn."""
    found = Compared()
    for i in range(arguments.rounds):
        order = [OURS, THEIRS] if i % 2 == 0 else [THEIRS, OURS]
        runs = {module: run_side(module, arguments) for module in order}
        check_losses(runs[OURS], runs[THEIRS], TOLERANCE[arguments.dtype])
        ours, theirs = (median(runs[module].reports[0].step_s) for module in (OURS, THEIRS))
        found.ours.append(ours)
        found.theirs.append(theirs)
        found.ideal.append(runs[OURS].ideal_s)
        load = os.getloadavg()[0]
        print(
            f"round {i + 1}/{arguments.rounds}  Pentad {ours:.3f} s  torch {theirs:.3f} s  "
            f"ideal {found.ideal[-1]:.3f} s  (load {load:.1f})",
            flush=True,
        )
    return found


def speed(arguments: argparse.Namespace) -> None:
    """Step times, and how much of torch's distance from the ideal is gone."""
    found = compare(arguments)
    ours, theirs, ideal = median(found.ours), median(found.theirs), median(found.ideal)
    print("\n| processes | schedule | dtype | Pentad s | torch s | ideal s | ours ÷ torch's | gap removed |")
    print("|---|---|---|---|---|---|---|---|")
    gap = f"{(theirs - ours) / (theirs - ideal):.0%}" if theirs > ideal else "no gap"
    if arguments.processes > (os.cpu_count() or 1):
        gap = "(fewer cores than processes)"
    print(
        f"| {arguments.processes} | {arguments.schedule} | {arguments.dtype} | {ours:.3f} | {theirs:.3f} "
        f"| {ideal:.3f} | {ours / theirs:.3f} | {gap} |"
    )


def slots(program: Program, rank: int) -> int:
    """Receive buffers that the program gives a process."""
    return len({(op.kind, op.stage, op.slot) for op in program.ranks[rank] if op.slot >= 0})


def memory(arguments: argparse.Namespace) -> None:
    """What is alive at most, for two numbers of microbatches.

    Raises:
        ValueError: Pentad has more receive buffers than slots.
    """
    print("\n| side | microbatches | slots | input buffers | gradient buffers | outputs | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|")
    for count in (8, 32):
        for label, module in (("Pentad", OURS), ("torch", THEIRS)):
            run = run_side(module, arguments, microbatches=count, watch=True, warmup=1, steps=1)
            live = [
                "/".join(str(report.live.get(kind, 0)) for report in run.reports)
                for kind in ("inputs", "grads", "outputs")
            ]
            rss = "/".join(f"{report.rss_mib:.0f}" for report in run.reports)
            given = [slots(run.program, rank) for rank in range(arguments.processes)] if module == OURS else []
            for report, most in zip(run.reports, given, strict=False):
                if report.live.get("inputs", 0) + report.live.get("grads", 0) > most:
                    raise ValueError(f"{report.live} are alive and there are {most} slots")
            print(f"| {label} | {count} | {'/'.join(map(str, given))} | {' | '.join(live)} | {rss} |", flush=True)
    print(f"\nAlive at a time, per process ({arguments.schedule}, {arguments.processes} processes).")


def overhead(arguments: argparse.Namespace) -> None:
    """The interpreter's time per operation, stages being empty."""
    print("\n| schedule | process | µs per operation beyond it | with it, without waiting |")
    print("|---|---|---|---|")
    for schedule in CHUNKS:
        run = run_side(OURS, arguments, schedule=schedule, empty=True, microbatches=64, warmup=5, steps=30)
        for rank, report in enumerate(run.reports):
            print(f"| {schedule} | {rank} | {report.overhead_us:.1f} | {report.operation_us:.1f} |", flush=True)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, choices=[2, 4], default=2)
    parser.add_argument("--schedule", choices=CHUNKS, default="1f1b")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a round before those")
    parser.add_argument("--memory", action="store_true", help="count live buffers instead")
    parser.add_argument("--overhead", action="store_true", help="measure empty stages instead")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    if arguments.overhead:
        overhead(arguments)
    elif arguments.memory:
        memory(arguments)
    else:
        speed(arguments)


if __name__ == "__main__":
    main()
