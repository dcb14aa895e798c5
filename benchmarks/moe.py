"""Training speed and memory of a mixture-of-experts model on CPU in one process: Pentad and transformers, in one run.

    python benchmarks/moe.py --dtype fp32 --rounds 3 --steps 4

The dense benchmark's model with 8 experts, 2 for each token, in every layer, each as wide as its feed-forward network:
about 166 M parameters. Same tokens, threads, fused AdamW and clipping on both sides. transformers computes experts with
its grouped_mm (`--implementations` also takes batched_mm and eager, its loop); the bf16 policies are those of
`peers/common.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch
from dense import check_losses
from harness import Side, as_json, compare, table

EXPERTS, TOP_K = 8, 2


def pentad_side(dtype: str, threads: int, compute: str) -> Side:
    """Pentad's trainer in one process."""
    arguments = ("--tp", "1", "--sharding", "ddp", "--experts", str(EXPERTS), "--top-k", str(TOP_K))
    return Side(f"Pentad {dtype} {compute}", "pentad_worker", dtype, 1, threads, (*arguments, "--compute", compute))


def peer_sides(dtype: str, threads: int, policies: list[str], implementations: list[str]) -> list[Side]:
    """transformers, once for each dtype policy and way of computing experts."""
    if dtype == "fp32":
        policies = ["fp32"]
    return [
        Side(f"transformers {dtype} {policy}, {way}", "peers.transformers_moe", f"{policy}-{way}", 1, threads)
        for policy in policies
        for way in implementations
    ]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps of a round before those")
    parser.add_argument("--compute", nargs="*", default=["auto"], help="model.moe.compute of Pentad's sides")
    parser.add_argument("--policies", nargs="*", default=["masters", "plain", "autocast"], help="of transformers' bf16")
    parser.add_argument("--implementations", nargs="*", default=["grouped_mm"], help="of transformers' experts")
    parser.add_argument("--json", type=Path, help="write the raw numbers there")
    arguments = parser.parse_args()

    dtype, threads = arguments.dtype, arguments.threads
    sides = [pentad_side(dtype, threads, compute) for compute in arguments.compute]
    sides += peer_sides(dtype, threads, arguments.policies, arguments.implementations)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    results = compare(sides, arguments.rounds, arguments.warmup, arguments.steps)
    ours = next((result for result in results if result.side.module == "pentad_worker"), None)
    print(f"\n{table(results, ours)}\n\n{check_losses(results)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
