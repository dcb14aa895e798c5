"""What sinks are given of a step: the values of its metrics, and how each of them is shown. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .metric import Alert, Metric


@dataclass(frozen=True)
class Shown:
    """A metric's value, as every sink shows it.

    Args:
        metric: whose value it is.
        value: None where it is not known, which is not zero.
        tracked: what trackers get, by their keys.
        cell: its text on the console's line; empty where it has no column.
        line: its own line on the console; empty where it has none.
    """

    metric: Metric
    value: Any
    tracked: Mapping[str, Any]
    cell: str
    line: str

    @staticmethod
    def of(metric: Metric, value: Any, step: int) -> Shown:
        """Numbers and arrays of numpy and torch become Python's."""
        value = value.tolist() if hasattr(value, "tolist") else value
        column, cell, line = metric.column, "", ""
        if column is not None:
            cell = column.unknown if value is None else column.show(value)
        if metric.line is not None and value is not None:
            line = metric.line(step, value)
        return Shown(metric, value, metric.tracked(value), cell, line)

    @property
    def alarming(self) -> bool:
        """Whether it is a number that is not finite."""
        return isinstance(self.value, float) and not math.isfinite(self.value)


@dataclass(frozen=True)
class Report:
    """The metrics of one step, each there in every step's report; or what became known of a step afterwards.

    Args:
        step: optimizer steps done.
        shown: in the order of the readings.
        skipped: whether this very step was skipped, for a gradient that was not finite.
    """

    step: int
    shown: tuple[Shown, ...]
    skipped: bool = False

    @staticmethod
    def of(step: int, values: Iterable[tuple[Metric, Any]]) -> Report:
        """Of values that no reading returned."""
        return Report(step, tuple(Shown.of(metric, value, step) for metric, value in values))

    @property
    def row(self) -> dict[str, Any]:
        """The object of metrics.jsonl."""
        return {s.metric.key: s.value for s in self.shown if s.metric.in_file}

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """What somebody should hear of at once."""
        return tuple(s.value for s in self.shown if isinstance(s.value, Alert))

    @property
    def tracked(self) -> dict[str, Any]:
        """What W&B and TensorBoard get, by key; what is not known is left out."""
        return {key: value for s in self.shown for key, value in s.tracked.items()}
