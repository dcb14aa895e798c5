"""How much memory the training needs."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ...memory.estimate import GIB, estimate
from ..formats import fixed
from ..metric import Column, Metric
from .protocol import OnRank, Reading, StepDone

_UNKNOWN = -math.inf
"""Below whatever another rank knows."""


class MemoryReading(Reading):
    """The peak of the rank that needs most, what the memory model said of it before the run, and how the allocator of
    a GPU fares."""

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
        Metric(
            "memory_pct",
            "`memory_gib` of what the device has: of a GPU all of it, on CPUs `hardware.memory_gib` where that is set",
            unit="%",
            in_file=False,
            tracker="mem/pct",
        ),
        Metric(
            "memory_reserved_gib",
            "on GPUs: the largest that the allocator has taken from a device, fragments included",
            unit="GiB",
            in_file=False,
            tracker="mem/reserved_gib",
        ),
        Metric(
            "memory_retries",
            "on GPUs: how often a device's allocator gave back what it kept and tried again; each costs time",
            in_file=False,
            tracker="mem/alloc_retries",
        ),
        Metric(
            "memory_ooms",
            "on GPUs: how often a device had no memory for what was asked",
            in_file=False,
            tracker="mem/ooms",
        ),
    )
    watched = 5

    @cached_property
    def _predicted(self) -> float:
        """GiB; asked for by the rank that reports."""
        return estimate(self.run.cfg).tensors / GIB

    def watch(self, mine: OnRank) -> Sequence[float]:
        if not self.run.device.startswith("cuda"):
            peak, whole = peak_memory_gib(), self.run.cfg.hardware.memory_gib
            return peak, 100 * peak / whole if whole else _UNKNOWN, _UNKNOWN, _UNKNOWN, _UNKNOWN
        import torch

        whole = torch.cuda.get_device_properties(self.run.device).total_memory
        return device_memory(torch.cuda.memory_stats(self.run.device), whole)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        found = [value if math.isfinite(value) else None for value in done.worst]
        keys = ("memory_gib", "memory_pct", "memory_reserved_gib", "memory_retries", "memory_ooms")
        return {**dict(zip(keys, found, strict=True)), "memory_model_gib": self._predicted}


def peak_memory_gib() -> float:
    """The most that this process has had in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_memory(stats: Mapping[str, int], whole: int) -> tuple[float, float, float, float, float]:
    """Of a GPU: its peak (GiB), the share of the device that is (%), what its allocator took at most (GiB), its second
    tries and its failures.

    Args:
        stats: `torch.cuda.memory_stats`.
        whole: bytes of the device.
    """
    peak = stats["allocated_bytes.all.peak"]
    reserved = stats["reserved_bytes.all.peak"]
    return peak / 2**30, 100 * peak / whole, reserved / 2**30, stats["num_alloc_retries"], stats["num_ooms"]
