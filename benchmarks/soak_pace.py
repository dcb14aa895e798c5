"""Imported into the ranks of `soak.py`: a step takes its time, so that the same steps without faults are soon done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pentad.trainer.metrics.readings import Metric, OnRank, Reading, StepDone, register

PACE_S = 0.1


@register
class Pace(Reading):
    """Every rank sleeps."""

    metrics = (Metric("pace_s", "seconds that were slept", unit="s"),)
    watched = 1

    def watch(self, mine: OnRank) -> Sequence[float]:
        time.sleep(PACE_S)
        return [PACE_S]

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {"pace_s": PACE_S}
