"""How fast the training is, and how much of that the loader costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import fixed, si
from ..metric import Column, Metric
from .protocol import OnRank, Reading, StepDone


class SpeedReading(Reading):
    """Tokens and seconds; the wait for data is that of the rank that waited longest."""

    metrics = (
        Metric(
            "step_time_s",
            "whole step",
            unit="s",
            tracker="perf/step_s",
            column=Column("step_s", 7, lambda seconds: fixed(seconds, 7, 3), colour="34", order=90),
        ),
        Metric(
            "tokens_per_s",
            "of the whole job",
            unit="1/s",
            tracker="perf/tokens_per_s",
            column=Column("tok/s", 6, si, colour="34", order=40),
        ),
        Metric("tokens_per_s_per_device", "of one rank", unit="1/s", tracker="perf/tokens_per_s_per_gpu"),
        Metric(
            "data_s",
            "waiting for the loader, within `step_time_s`, on the rank that waited longest",
            unit="s",
            tracker="perf/data_s",
        ),
        Metric(
            "data_pct",
            "`data_s` over `step_time_s`",
            unit="%",
            in_file=False,
            tracker="perf/data_pct",
            column=Column("data%", 5, lambda share: fixed(share, 5, 1), colour="90", order=80),
        ),
    )
    watched = 1

    def watch(self, mine: OnRank) -> Sequence[float]:
        return (mine.data_s,)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        (data_s,) = done.worst
        return {
            "step_time_s": done.seconds,
            "tokens_per_s": done.tokens / done.seconds,
            "tokens_per_s_per_device": done.tokens * (1.0 / (done.seconds * self.run.devices)),
            "data_s": data_s,
            "data_pct": 100.0 * data_s / done.seconds,
        }
