"""Steps as readings and sinks see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pentad.configs.schema import Config
from pentad.trainer.metrics.metric import Metric
from pentad.trainer.metrics.readings.protocol import RunFacts, StepDone
from pentad.trainer.metrics.readings.registry import BUILT_IN, Readings
from pentad.trainer.metrics.report import Report, Shown
from tests.training import job

DONE = StepDone(
    step=7,
    loss=2.5,
    grad_norm=1.25,
    lr=3e-4,
    skipped=False,
    skips=1,
    tokens=800,
    tokens_seen=1800,
    valid=799,
    pairs=6000.0,
    seconds=2.0,
)
WORST = (0.1, 1.5, *[-math.inf] * 4, 0.03)
"""Seconds of waiting for data, GiB of memory and what only a GPU knows, seconds without a sign of life."""
_VALUES = {
    **{"step": 7, "loss": 2.5, "grad_norm": 1.25, "lr": 3e-4, "tokens": 1800, "skipped": 1, "done_pct": 70.0},
    **{"step_time_s": 2.0, "tokens_per_s": 400.0, "tokens_per_s_per_device": 100.0, "data_s": 0.1, "data_pct": 5.0},
    **{"mfu": 0.2, "mfu_full": 0.25, "hfu": 0.3, "tflops_per_device": 20.0, "peak_tflops": 100.0, "memory_gib": 1.5},
}


def facts(cfg: Config | None = None, *, devices: int = 4, peak_tflops: float | None = 100.0) -> RunFacts:
    """Of a run on CPU ranks."""
    return RunFacts(cfg=cfg or job(), devices=devices, device="cpu", peak_tflops=peak_tflops)


def read(run: RunFacts, **changes: Any) -> Report:
    """What pentad's own readings make of the step `DONE` with changes."""
    return Readings(run, BUILT_IN).step(replace(DONE, **changes), WORST)


def values(report: Report) -> dict[str, Any]:
    """By key, also of the metrics that the file does not have."""
    return {shown.metric.key: shown.value for shown in report.shown}


def report(
    *, cfg: Config | None = None, skipped: bool = False, extra: Mapping[Metric, Any] = {}, **changes: Any
) -> Report:
    """A report of pentad's own metrics with these values, and of `extra` ones behind them."""
    found = {**_VALUES, **changes}
    shown = [Shown.of(m, found.pop(m.key, None), found.get("step", 7)) for m in Readings(facts(cfg), BUILT_IN).metrics]
    assert not found, f"no metric has the keys {sorted(found)}"
    shown += [Shown.of(metric, value, 7) for metric, value in extra.items()]
    return Report(changes.get("step", 7), tuple(shown), skipped)
