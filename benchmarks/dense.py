"""Training speed and memory of a dense 33.6 M parameter Llama on CPU: Pentad and its peers, in one run.

    python benchmarks/dense.py --mode one|tp|dp|tpdp --dtype fp32|bf16 --rounds 3 --steps 6

Needs Pentad installed, and transformers. Policies of the peers: see `peers/common.py`. All sides get the same number
of processes and threads, the same batch size, fused AdamW, clipping at 1.0 and flushed denormals. The libraries' own
memory is shown beside the peak, since importing transformers costs more than importing Pentad.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path

import torch
from harness import Result, Side, as_json, compare, table
from workload import Workload

# mode: processes, threads of each, tensor-parallel degree, peer's name and module, its bf16 policies
MODES = {
    "one": (1, 2, 1, "transformers", "peers.transformers_one", ("masters", "plain", "autocast")),
    "tp": (2, 1, 2, "DTensor tp", "peers.dtensor_tp", ("masters", "plain")),
    "dp": (2, 1, 1, "FSDP2, no reshard", "peers.fsdp2", ("mixed",)),
    "tpdp": (4, 1, 2, "FSDP2 × DTensor", "peers.fsdp2_dtensor", ("mixed",)),
}


def pentad_side(mode: str, dtype: str) -> Side:
    """Pentad's trainer in the layout of `mode`, data parallel with sharded optimizer states."""
    processes, threads, tp, *_ = MODES[mode]
    arguments = ("--tp", str(tp), "--sharding", "zero1")
    return Side(f"Pentad {dtype}", "pentad_worker", dtype, processes, threads, arguments)


def peer_sides(mode: str, dtype: str) -> list[Side]:
    """The peer in the layout of `mode`, once for each of its dtype policies."""
    processes, threads, _, name, module, policies = MODES[mode]
    if dtype == "fp32":
        policies = ("fp32",)
    return [Side(f"{name} {dtype} {p}".replace("fp32 fp32", "fp32"), module, p, processes, threads) for p in policies]


def check_losses(results: list[Result]) -> str:
    """One line: whether every side starts near the loss of a uniform guess, ln(vocabulary)."""
    uniform = math.log(Workload().vocab)
    far = [r.side.label for r in results if abs(r.losses[0] - uniform) > 0.5]
    verdict = f"NOT near it: {', '.join(far)}" if far else "all sides within 0.5 of it"
    return f"first loss against ln {Workload().vocab} = {uniform:.3f}: {verdict}"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="one")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a round before those")
    parser.add_argument("--sides", choices=["all", "peers", "pentad"], default="all")
    parser.add_argument("--json", type=Path, help="write the raw numbers there")
    arguments = parser.parse_args()

    sides = [] if arguments.sides == "peers" else [pentad_side(arguments.mode, arguments.dtype)]
    sides += [] if arguments.sides == "pentad" else peer_sides(arguments.mode, arguments.dtype)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, mode {arguments.mode}")
    results = compare(sides, arguments.rounds, arguments.warmup, arguments.steps)
    ours = next((result for result in results if result.side.module == "pentad_worker"), None)
    print(f"\n{table(results, ours)}\n\n{check_losses(results)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
