"""The numbers of a run's metrics.jsonl as columns, and columns of long runs made short without losing their peaks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_DIGITS = 6
MOST = 1000
"""Points of a line; of longer runs each point stands for neighbouring steps, with their mean, lowest and highest."""


@dataclass(frozen=True)
class Columns:
    """Values over the steps.

    Args:
        steps: (n,) ascending, each once.
        values: (n,) for each key, NaN where it is not known.
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> Columns:
        """Of rows with ascending steps."""
        steps = np.array([row["step"] for row in rows], np.int64)
        return Columns(steps, {key: np.array([known_number(row.get(key)) for row in rows], float) for key in keys})


def known_number(value: Any) -> float:
    """A number of a file as a float; NaN for whatever is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def by_step(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that say a step, in its order; of several of one step the last."""
    found = {
        step: row
        for row in rows
        if isinstance(step := row.get("step"), int) and not isinstance(step, bool) and 0 <= step < 1 << 53
    }
    return [found[step] for step in sorted(found)]


def starts_of(count: int, most: int = MOST) -> np.ndarray:
    """Where each of at most `most` groups of neighbours begins, among `count` values."""
    groups = min(count, most)
    return np.arange(groups) * count // max(groups, 1)


def last_of(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The last value of each group."""
    return values[np.append(starts[1:], len(values)) - 1] if len(values) else values


def mean_of(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The mean of what is known of each group; NaN without any."""
    if not len(values):
        return values
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    counts = np.add.reduceat(known.astype(float), starts)
    return np.divide(sums, counts, out=np.full(len(starts), math.nan), where=counts > 0)


def line(values: np.ndarray, starts: np.ndarray) -> dict[str, list[float | None]]:
    """A column as the page draws it: the mean of each group, with its lowest and highest where there is more than one.

    Args:
        values: (n,) with NaN where nothing is known.
        starts: as of `starts_of`.
    """
    found = {"mean": rounded(mean_of(values, starts))}
    if len(starts) < len(values):
        found["low"] = rounded(np.fmin.reduceat(values, starts))
        found["high"] = rounded(np.fmax.reduceat(values, starts))
    return found


def most_of(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of each group along the first axis what lies farthest from 0, with its sign; NaN where nothing is known.

    Args:
        values: (n, …).
        starts: as of `starts_of`.
    """
    if not len(values):
        return values
    low, high = np.fmin.reduceat(values, starts, axis=0), np.fmax.reduceat(values, starts, axis=0)
    return np.where(np.abs(low) > np.abs(high), low, high)


def rounded(values: Iterable[float]) -> list[float | None]:
    """Six significant digits; None for what is not finite."""
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values]
