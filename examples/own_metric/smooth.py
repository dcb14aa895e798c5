"""Two metrics of one's own: the running mean of the loss, and the CPU seconds of the rank that computed most.

Both are written to metrics.jsonl and sent to the trackers that the job has; the mean has a column on the console.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pentad.trainer.metrics.readings import Column, Metric, OnRank, Reading, RunFacts, StepDone, register

KEEP = 0.9
"""What a step leaves of the mean before it."""


@register
class SmoothLoss(Reading):
    """Only the rank that reports needs it: it has the loss of the whole batch."""

    metrics = (
        Metric(
            "loss_mean",
            "running mean of the loss",
            tracker="loss/mean",
            column=Column("mean", 7, lambda value: f"{value:.4f}", order=11),
        ),
    )

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        self._sum = self._weight = 0.0

    def step(self, done: StepDone) -> Mapping[str, Any]:
        if math.isfinite(done.loss):  # a skipped step has none
            self._sum = KEEP * self._sum + (1 - KEEP) * done.loss
            self._weight = KEEP * self._weight + (1 - KEEP)
        return {"loss_mean": self._sum / self._weight if self._weight else None}


@register
class CpuSeconds(Reading):
    """A number of every rank: each is asked inside the step, and the largest is known with the loss."""

    metrics = (
        Metric(
            "cpu_s",
            "CPU seconds of the step, on the rank that took most",
            unit="s",
            tracker="speed/cpu_s",
        ),
    )
    watched = 1

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        self._before = time.process_time()

    def watch(self, mine: OnRank) -> Sequence[float]:
        before, self._before = self._before, time.process_time()
        return (self._before - before,)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {"cpu_s": done.worst[0]}
