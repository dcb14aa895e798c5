"""CPU time of the experts' GEMMs, one way after the other, each in a process of its own.

    python benchmarks/grouped.py --dtype bf16

Forward, dx and dW of one matrix per expert, one thread; every repetition has other numbers of rows, as routers give
them. Processes are apart because oneDNN's compiled kernels are shared within one. Peak memory is of the largest case.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from pentad.parallel.kernels.grouped_gemm import GroupedMm, Groups, Loop, RoundedLoop

WAYS = {"loop": Loop, "rounded": RoundedLoop, "grouped_mm": GroupedMm}
CASES = ((8, 512, 1536, 512), (16, 256, 512, 512), (32, 128, 256, 512), (64, 64, 128, 256), (64, 16, 128, 256))
"""Experts, rows of one on average, out, in."""


def draw(experts: int, rows: int) -> Groups:
    """Numbers of rows that sum to `rows`, as of a router in use: some experts get half as much again as others."""
    share = torch.softmax(torch.randn(experts) * 0.15, 0)
    return Groups(tuple(torch.bincount(torch.multinomial(share, rows, True), minlength=experts).tolist()))


def measure(way: str, dtype: torch.dtype) -> list[float]:
    """Milliseconds of CPU time of each case, then this process's peak memory in MiB."""
    torch.set_num_threads(1)
    found = []
    for experts, average, out, inner in CASES:
        torch.manual_seed(0)
        rows = experts * average
        x, dy = torch.randn(rows, inner).to(dtype), torch.randn(rows, out).to(dtype)
        weight, total = torch.randn(experts, out, inner).to(dtype), torch.zeros(experts, out, inner)
        warmup, repeats, spent = 6, 12, 0.0
        for i in range(warmup + repeats):
            gemms = WAYS[way](draw(experts, rows))
            begin = time.process_time()
            gemms.forward(x, weight)
            gemms.backward([dy], [weight])
            gemms.add_weight(dy, x, total, True)
            spent += (time.process_time() - begin) * (i >= warmup)
        found.append(spent / repeats * 1e3)
    return [*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def main() -> None:
    """Measure every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--way", choices=WAYS, help="only this one, in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.way:
        dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
        print(json.dumps(measure(arguments.way, dtype)))
        return
    print("| way | " + " | ".join(f"{e} × {a}, {o} × {i}" for e, a, o, i in CASES) + " | peak MiB |")
    print("|---" * (len(CASES) + 2) + "|")
    for way in WAYS:
        command = [sys.executable, __file__, "--dtype", arguments.dtype, "--way", way]
        *times, memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {way} | " + " | ".join(f"{t:.1f}" for t in times) + f" | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
