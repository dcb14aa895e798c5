"""Runs sides (a peer or Pentad) as processes of their own, in interleaved rounds, and compares them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from workload import Measurement, Workload

from pentad.launch.supervise.launcher import rank_environment

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Side:
    """One contestant: a worker module that takes `workload.worker_arguments`, and how many processes run it."""

    label: str
    module: str
    policy: str
    processes: int
    threads: int
    arguments: tuple[str, ...] = ()


@dataclass
class Result:
    """All rounds of one side."""

    side: Side
    tokens_per_s: list[float] = field(default_factory=list)
    """Median over the steps of a round, one number a round."""
    rss_mib: list[float] = field(default_factory=list)
    """Peak resident memory, summed over the processes, one number a round."""
    libraries_mib: float = 0.0
    """Of which held right after the imports."""
    losses: list[float] = field(default_factory=list)

    def add(self, ranks: Sequence[Measurement], workload: Workload) -> None:
        """Add a round's reports, one a process."""
        self.tokens_per_s.append(workload.tokens / median(ranks[0].step_s))
        self.rss_mib.append(sum(rank.rss_mib for rank in ranks))
        self.libraries_mib = sum(rank.libraries_mib for rank in ranks)
        self.losses = ranks[0].losses


def run_side(side: Side, warmup: int, steps: int, timeout_s: float = 1800.0) -> list[Measurement]:
    """Run one side once under torchrun.

    Returns:
        The reports of its processes, by rank.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--policy", side.policy, "--warmup", str(warmup), "--steps", str(steps), "--out", out]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(side.processes), "-m", side.module, *arguments, *side.arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(side.threads), "HF_HUB_OFFLINE": "1"}
        if side.module == "pentad_worker":  # what `pentad train` sets; the peers have no launcher that does
            environment = rank_environment(side.processes, cuda=False) | environment
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"{side.label} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-6000:]}")
        files = [Path(out) / f"rank-{rank}.json" for rank in range(side.processes)]
        return [Measurement(**json.loads(file.read_text())) for file in files]


def compare(
    sides: Sequence[Side], rounds: int, warmup: int, steps: int, workload: Workload | None = None
) -> list[Result]:
    """Every side once a round; the order turns, so that no side always follows the same one.

    Args:
        workload: what the sides were told to do; none: the usual one.
    """
    workload = workload or Workload()
    results = [Result(side) for side in sides]
    for i in range(rounds):
        turn = i % len(results)
        for result in results[turn:] + results[:turn]:
            result.add(run_side(result.side, warmup, steps), workload)
            speed, load = result.tokens_per_s[-1], os.getloadavg()[0]
            print(f"round {i + 1}/{rounds}  {result.side.label:<44} {speed:8.0f} tok/s  (load {load:.1f})", flush=True)
    return results


def table(results: Sequence[Result], ours: Result | None) -> str:
    """Markdown table: medians over rounds; the ratios are ours divided by the row's."""
    lines = [
        "| side | processes × threads | tok/s (min–max) | ours ÷ it | peak RSS MiB (libraries) | ours ÷ it | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        side, speed, memory = result.side, median(result.tokens_per_s), median(result.rss_mib)
        ratios = ("", "")
        if ours is not None and ours is not result:
            ratios = (f"{median(ours.tokens_per_s) / speed:.2f}", f"{median(ours.rss_mib) / memory:.2f}")
        spread = f"{speed:.0f} ({min(result.tokens_per_s):.0f}–{max(result.tokens_per_s):.0f})"
        lines.append(
            f"| {side.label} | {side.processes} × {side.threads} | {spread} | {ratios[0]} "
            f"| {memory:.0f} ({result.libraries_mib:.0f}) | {ratios[1]} "
            f"| {result.losses[0]:.3f} → {result.losses[-1]:.3f} |"
        )
    return "\n".join(lines)


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The raw numbers of all rounds."""
    return [asdict(result) for result in results]
