"""How often a job that goes on after faults copies its state, and what that takes of its steps.

    python benchmarks/snapshot_budget.py
    python benchmarks/snapshot_budget.py --ranks 4 --steps 120

Ranks of data parallelism (`zero1`) train small models with `faults.recover=true`, each size a job of its own. After 4,
16 and 64 steps they agree on k, the steps from one copy to the next, so that copies take at most 3 % of the steps'
time. A row has what the last agreement measured (event `snapshots`), and the share of the time of the steps after it
that the waterfall gives to copies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SIZES = ((64, 176, 3), (256, 704, 3), (512, 1408, 3))
"""Hidden size, inner size, layers."""


@dataclass(frozen=True)
class Budget:
    """What a job found.

    Args:
        mib: of state a rank.
        every: k.
        copy_ms, step_ms: of the last agreement.
        share: of the time of the steps after it that copies took.
    """

    mib: float
    every: int
    copy_ms: float
    step_ms: float
    share: float


def measure(size: tuple[int, int, int], ranks: int, steps: int, folder: Path) -> Budget:
    """Runs a job."""
    hidden, inner, layers = size
    job: dict[str, Any] = {
        "name": "budget",
        "runs_dir": str(folder),
        "model": {"layers": layers, "hidden": hidden, "ffn": inner, "heads": 4, "kv_heads": 4, "vocab": 320},
        "parallel": {"dp": ranks, "data": {"sharding": "zero1"}},
        "train": {"steps": steps, "seq_len": 128, "global_batch": 4 * ranks, "micro_batch": 4, "dtype": "fp32"},
        "data": {"name": "stdlib"},
        "checkpoint": {"final": False},
        "faults": {"recover": True},
    }
    config = folder / "job.yaml"
    config.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "pentad.launch.cli", "train", str(config), "train.device=cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    told = [found for found in _lines(folder / "budget" / "events.jsonl") if found["event"] == "snapshots"][-1]
    rows = [
        row for row in _lines(folder / "budget" / "metrics.jsonl") if row["step"] > told["step"] and row["waterfall"]
    ]
    seconds = sum(row["step_time_s"] for row in rows)
    copies = sum(row["step_time_s"] * (row["waterfall"].get("snapshot") or 0.0) for row in rows)
    return Budget(told["mib"], told["every"], told["ms"], told["step_ms"], copies / seconds)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    """Prints a row a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--steps", type=int, default=100, help="of each job (100)")
    args = parser.parse_args()
    print("| MiB a rank | k | copy ms | step ms | copies' share |\n|---|---|---|---|---|")
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(size, args.ranks, args.steps, Path(folder))
        times = f"{found.copy_ms:.2f} | {found.step_ms:.1f}"
        print(f"| {found.mib:.2f} | {found.every} | {times} | {100 * found.share:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
