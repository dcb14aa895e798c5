"""How much memory the training needs."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ...memory.estimate import GIB, estimate
from ..formats import fixed
from ..metric import Column, Metric
from .protocol import OnRank, Reading, StepDone


class MemoryReading(Reading):
    """The peak of the rank that needs most, and what the memory model said of it before the run."""

    metrics = (
        Metric(
            "memory_gib",
            "peak of the device that needs most",
            unit="GiB",
            tracker="mem/active_gib",
            column=Column("mem", 6, lambda gib: fixed(gib, 5, 2) + "G", colour="36", order=70),
        ),
        Metric(
            "memory_model_gib",
            "what the memory model says of the tensors of that device: on GPUs to be compared with `memory_gib`, which "
            "on CPUs is all that the process has",
            unit="GiB",
            tracker="mem/model_gib",
        ),
    )
    watched = 1

    @cached_property
    def _predicted(self) -> float:
        """GiB; asked for by the rank that reports."""
        return estimate(self.run.cfg).tensors / GIB

    def watch(self, mine: OnRank) -> Sequence[float]:
        return (peak_memory_gib(self.run.device),)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {"memory_gib": done.worst[0], "memory_model_gib": self._predicted}


def peak_memory_gib(device: str) -> float:
    """Peak memory of this rank so far: allocated on its GPU, or resident in this process on a CPU.

    Args:
        device: as torch calls it.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
