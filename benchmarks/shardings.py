"""Pentad's kinds of data parallelism beside each other, in one run: the dense benchmark's model on several processes.

    python benchmarks/shardings.py --processes 2 --dtype fp32 --rounds 2 --steps 4

The ratios are those of the first kind to each other one. Of DeepSpeed's engine there is a row for each stage of ZeRO,
around our model, with our update.
"""

from __future__ import annotations

import argparse
import os
import platform

import torch
from harness import Side, compare, table

KINDS = {
    "zero1": ("zero1", 0),
    "fsdp": ("fsdp", 0),
    "fsdp2": ("fsdp2", 0),
    "ZeRO 1": ("deepspeed", 1),
    "ZeRO 2": ("deepspeed", 2),
    "ZeRO 3": ("deepspeed", 3),
}
"""Row: parallel.data.sharding, and DeepSpeed's stage."""


def side(label: str, processes: int, dtype: str) -> Side:
    """Our trainer with a kind of data parallelism, one thread a process."""
    sharding, stage = KINDS[label]
    arguments = ("--tp", "1", "--sharding", sharding, *(("--stage", str(stage)) if stage else ()))
    return Side(label, "pentad_worker", dtype, processes, 1, arguments)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a round before those")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    sides = [side(label, arguments.processes, arguments.dtype) for label in arguments.kinds]
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {arguments.processes} processes")
    results = compare(sides, arguments.rounds, arguments.warmup, arguments.steps)
    print(f"\n{table(results, results[0])}")


if __name__ == "__main__":
    main()
