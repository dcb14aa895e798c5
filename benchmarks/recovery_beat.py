"""Imported into our ranks of `recovery.py`: each says, inside the next step, that it has done one,
and sleeps as those of the peers do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from peers.beating import beat
from recovery import PACE_S

from pentad.trainer.metrics.readings import Metric, OnRank, Reading, StepDone, register


@register
class Beat(Reading):
    """Every rank's."""

    metrics = (Metric("beat", "steps that this rank has said"),)
    watched = 1

    def watch(self, mine: OnRank) -> Sequence[float]:
        beat(-1, mine.step - 1)  # the step before is done; how its slot is numbered is nothing that a reading knows
        time.sleep(PACE_S)
        return [0.0]

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {"beat": done.step}
