"""Training speed with the context shared by two processes, against one process with as many threads, in one run.

    python benchmarks/context.py --dtype fp32|bf16 --rounds 3 --steps 3

A Llama with grouped key-value heads (4 layers, hidden 512, 8 query and 2 key-value heads, ffn 1536, vocabulary 8192,
14.9 M parameters) on one sequence of 8192 tokens a step: two thirds of a layer's FLOPs are attention. Both sides are
Pentad's whole trainer, with the same arithmetic on the same cores; what differs is who has which tokens. The ratio is
what context parallelism costs in all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from harness import Result, Side, as_json, compare, table
from workload import Workload

METHODS = ("ring", "ulysses", "allgather")
TARGETS = {"fp32": 0.90, "bf16": 0.85}
"""Speed of ring and Ulysses over one process's."""
WORK = {"layers": 4, "kv_heads": 2, "global_batch": 1}


def sides_of(dtype: str, methods: list[str], processes: int, work: dict[str, int]) -> list[Side]:
    """One process with a thread for each of the others, then a side for each method ("ring-duplex": both ways)."""
    common = ("--tp", "1", "--sharding", "zero1", "--work", json.dumps(work))
    sides = [Side(f"one process {dtype}", "pentad_worker", dtype, 1, processes, common)]
    for name in methods:
        method, _, duplex = name.partition("-")
        arguments = ("--cp", str(processes), "--context", method, *(["--duplex"] if duplex else []))
        sides.append(Side(f"{name} {dtype}", "pentad_worker", dtype, processes, 1, (*common, *arguments)))
    return sides


def ratios(results: list[Result], target: float) -> str:
    """One line a method: its speed over one process's, the median of the rounds' own ratios."""
    one, *others = results
    lines = []
    for result in others:
        each = [mine / theirs for mine, theirs in zip(result.tokens_per_s, one.tokens_per_s, strict=True)]
        far = max(abs(a - b) for a, b in zip(result.losses, one.losses, strict=True))
        lines.append(
            f"{result.side.label:<16} {median(each):.3f} of one process ({min(each):.3f} to {max(each):.3f}; "
            f"target for ring and ulysses {target:.2f}), losses within {far:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=TARGETS, default="fp32")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="of parallel.context, and ring-duplex")
    parser.add_argument("--processes", type=int, default=2, help="context ranks, and threads of the one process")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps of a round before those")
    parser.add_argument("--json", type=Path, help="write the raw numbers there")
    arguments = parser.parse_args()

    work = {**WORK, "seq_len": arguments.seq_len}
    sides = sides_of(arguments.dtype, arguments.methods, arguments.processes, work)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, sequence {arguments.seq_len}")
    results = compare(sides, arguments.rounds, arguments.warmup, arguments.steps, replace(Workload(), **work))
    print(f"\n{table(results, None)}\n\n{ratios(results, TARGETS[arguments.dtype])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
