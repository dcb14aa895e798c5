"""A model of the MFU of a training step on an H100, from the kernels that the code asks for. Nothing runs on a GPU.

    python -m benchmarks.kernel_model             1B, 3B, 8B and 8 x 8B, with what the time goes to
    python -m benchmarks.kernel_model --only 8B

The step is traced on meta tensors (tests/cuda_step), and each kernel takes the longest of three times: its FLOPs at a
rate that such kernels reach, its bytes at the memory's speed, and a start. One GPU, no communication, no gap between
kernels, no wait: real runs are slower.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from pentad.models.costs.flops import flops_per_step
from tests.cuda_step.jobs import make_batch, make_job, uneven_ends
from tests.cuda_step.step import trace_step
from tests.cuda_step.trace import Kernel

LENGTH = 8192
PEAK = 989e12
"""FLOP/s of bf16 products, dense, of an H100 SXM."""


@dataclass(frozen=True, eq=False)
class Rates:
    """What kernels reach.

    Args:
        flops: FLOP/s by kind of kernel.
        bandwidth: of the memory, bytes/s, as long reads and writes get.
        start: seconds that a kernel takes at least.
    """

    flops: Mapping[str, float]
    bandwidth: float = 4e12
    start: float = 2.5e-6

    def seconds(self, kind: str, flops: float, nbytes: float) -> float:
        """Of one kernel.

        Raises:
            ValueError: its FLOPs are not known.
        """
        if flops != flops:
            raise ValueError("a kernel's FLOPs depend on values, which a trace does not have")
        work = flops / self.flops[kind] if kind in self.flops else 0.0
        return max(work, nbytes / self.bandwidth, self.start)


_PRODUCTS = {"product": 0.8 * PEAK, "fp32 product": 40e12}
FLASH_2 = Rates({**_PRODUCTS, "attention": 350e12, "attention backward": 290e12})
"""With FlashAttention-2."""
HOPPER = Rates({**_PRODUCTS, "attention": 590e12, "attention backward": 490e12})
"""With attention made for Hopper: cuDNN's, FlashAttention-3."""


@dataclass(frozen=True)
class Case:
    """A preset, microbatches of one sequence a step, and ranks that share the optimizer's work."""

    preset: str
    microbatches: int
    optimizer_ranks: int = 1


CASES = {
    "1B": Case("llama3.2_1b", 4),
    "3B": Case("llama3.2_3b", 4),
    "8B": Case("llama3.1_8b", 4),
    "8 x 8B": Case("llama3_8b_e8t2", 2, 8),
}

_PARTS = (
    ("trainer.optim", "optimizer and norm"),
    ("trainer.step", "optimizer and norm"),
    ("parallel.kernels.triton.norms", "RMSNorm"),
    ("parallel.kernels.triton.gates", "SwiGLU"),
    ("parallel.kernels.triton.rotary", "rotary embedding"),
    ("parallel.vocab", "loss and embedding"),
    ("parallel.kernels.triton.cross_entropy", "loss and embedding"),
    ("models.routing", "router"),
    ("parallel.expert", "rows of experts"),
    ("parallel.kernels.triton.rows", "rows of experts"),
)


def part_of(kernel: Kernel) -> str:
    """What a kernel is for."""
    if "product" in kernel.kind:
        return kernel.kind + "s"
    if kernel.kind.startswith("attention"):
        return "attention"
    return next((part for place, part in _PARTS if kernel.place.startswith(place)), "rest")


@dataclass(frozen=True)
class Estimate:
    """Of a step.

    Args:
        kernels: launches.
        flops: that count for MFU.
        seconds: by part.
    """

    kernels: int
    flops: float
    seconds: Mapping[str, float]

    @property
    def mfu(self) -> float:
        """A fraction of 1."""
        return self.flops / (PEAK * sum(self.seconds.values()))


def rates_of(kernels: Iterable[Kernel]) -> Rates:
    """Those of the attention that a step uses."""
    return FLASH_2 if any("flash" in kernel.name for kernel in kernels) else HOPPER


def estimate(case: Case, folder: Path) -> Estimate:
    """The step of a case as the code is."""
    job = (f"train.global_batch={case.microbatches}", f"train.seq_len={LENGTH}", "train.kernels=triton")
    cfg = make_job(folder, case.preset, *job, layers=None)
    kernels = trace_step(cfg, partial(make_batch, length=LENGTH), uneven_ends(cfg)).kernels
    rates, seconds = rates_of(kernels), defaultdict[str, float](float)
    for kernel in kernels:
        part = part_of(kernel)
        share = case.optimizer_ranks if part == "optimizer and norm" else 1
        seconds[part] += rates.seconds(kernel.kind, kernel.flops, kernel.nbytes / share)
    tokens = case.microbatches * LENGTH
    return Estimate(len(kernels), flops_per_step(cfg.model, tokens, tokens * LENGTH / 2), seconds)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=list(CASES))
    chosen = parser.parse_args().only
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [chosen] if chosen else CASES:
            found[name] = estimate(CASES[name], Path(folder))
    parts = sorted({part for each in found.values() for part in each.seconds})
    print("A model, from traced kernels: nothing ran on a GPU. Milliseconds a step of microbatches of 8192 tokens.")
    print(f"{'':22}" + "".join(f"{name:>10}" for name in found))
    for part in parts:
        print(f"{part:22}" + "".join(f"{1e3 * each.seconds.get(part, 0):10.1f}" for each in found.values()))
    print(f"{'all':22}" + "".join(f"{1e3 * sum(each.seconds.values()):10.1f}" for each in found.values()))
    print(f"{'kernels':22}" + "".join(f"{each.kernels:10d}" for each in found.values()))
    print(f"{'MFU':22}" + "".join(f"{100 * each.mfu:9.1f}%" for each in found.values()))


if __name__ == "__main__":
    main()
