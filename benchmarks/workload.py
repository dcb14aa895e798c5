"""The work that every side does, and how a worker process measures it. Imports neither Pentad nor a peer."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """A dense Llama of 33.6 M parameters and its batch."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 1536
    vocab: int = 8192
    seq_len: int = 512
    global_batch: int = 4
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step, over all processes."""
        return self.seq_len * self.global_batch


@dataclass(frozen=True)
class Measurement:
    """What one worker process reports."""

    step_s: list[float]
    """Seconds of each step after the warm-up."""
    losses: list[float]
    """Loss of every step, the warm-up's included."""
    rss_mib: float
    """Peak resident memory of the process in MiB."""
    libraries_mib: float
    """The same right after the imports, before the model exists."""


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def random_batch(workload: Workload, step: int) -> Tensor:
    """Tokens of a global batch (global_batch, seq_len), the same on every process and for every peer."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, workload.vocab, (workload.global_batch, workload.seq_len), generator=generator)


def worker_arguments() -> argparse.Namespace:
    """Arguments that `harness.run_side` gives to every worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for rank-N.json")
    return parser.parse_args()


def write_measurement(out: Path, found: Measurement) -> None:
    """Write this process's report where `harness.run_side` reads it."""
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(asdict(found)))


def run_worker(build: Callable[[Workload, str], Callable[[Tensor], Tensor]]) -> None:
    """Body of a peer's worker: time the steps of ``build(workload, policy)``.

    Args:
        build: makes the model and the optimizer and returns the step: global batch (global_batch, seq_len) to loss.
    """
    arguments, workload = worker_arguments(), Workload()
    # Random logits give denormal softmax gradients, which slow x86 GEMMs down many times; Pentad sets the same.
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    libraries = peak_rss_mib()
    step = build(workload, arguments.policy)
    times: list[float] = []
    losses: list[float] = []
    for i in range(arguments.warmup + arguments.steps):
        batch = random_batch(workload, i)
        start = time.perf_counter()
        losses.append(step(batch).item())
        times.append(time.perf_counter() - start)
    measured = Measurement(times[arguments.warmup :], losses, peak_rss_mib(), libraries)
    write_measurement(arguments.out, measured)
    if dist.is_initialized():
        # Left to the interpreter's exit, gloo's threads can abort the process.
        dist.barrier()
        dist.destroy_process_group()
