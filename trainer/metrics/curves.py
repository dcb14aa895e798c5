"""The picture of a run: loss, learning rate and MFU over the steps, from the files of its folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..run_folder import RunFile
from .summary import lines_of

_BLUE, _RED, _GREEN, _GREY = "#2563eb", "#dc2626", "#059669", "#9ca3af"
_SMOOTHED_FROM = 50
"""Steps from which on the loss is drawn smoothed over its own points."""


def draw_curves(run: Path) -> Path | None:
    """Draws `curves.png` into the run's folder; none where there are fewer than two steps to draw.

    The held-out loss is drawn at the steps of its evaluations, skipped steps and restarts as lines across.
    """
    steps = [s for s in lines_of(run / RunFile.METRICS) if isinstance(s.get("step"), int)]
    if len(steps) < 2:
        return None
    events = [e for e in lines_of(run / RunFile.EVENTS) if isinstance(e.get("step"), int)]
    # Not pyplot, which keeps every figure and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=110, layout="constrained")
    loss, rate, mfu = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    at = [s["step"] for s in steps]
    _draw_loss(loss, at, steps, events)
    rate.plot(at, _values(steps, "lr"), color=_GREY)
    rate.set_ylabel("learning rate")
    _draw_speed(mfu, at, steps)
    mfu.set_xlabel("step")
    for axes in (loss, rate, mfu):
        axes.grid(alpha=0.25)
        for event in events:
            if event["event"] == "start" and event["step"] > at[0]:
                axes.axvline(event["step"], color=_GREY, linestyle=":", linewidth=1)
    figure.suptitle(run.name)
    path = run / RunFile.CURVES
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _draw_loss(axes: Any, at: list[int], steps: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    losses = _values(steps, "loss")
    smoothed = len(at) >= _SMOOTHED_FROM
    axes.plot(at, losses, color=_BLUE, alpha=0.35 if smoothed else 1.0, linewidth=1, label="" if smoothed else "loss")
    if smoothed:
        axes.plot(at, _smooth(losses, len(at) // 25), color=_BLUE, label="loss, smoothed")
    held = [e for e in events if e["event"] == "evaluation" and at[0] <= e["step"] <= at[-1]]
    if held:
        axes.plot(
            [e["step"] for e in held], _values(held, "loss"), "o-", color=_RED, markersize=4, label="held-out loss"
        )
    before = steps[0].get("skipped") or 0
    for s in steps[1:]:
        if (s.get("skipped") or 0) > before:
            axes.axvline(s["step"], color=_RED, alpha=0.4, linewidth=1)
        before = s.get("skipped") or 0
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right")


def _draw_speed(axes: Any, at: list[int], steps: list[dict[str, Any]]) -> None:
    mfu = _values(steps, "mfu")
    if any(math.isfinite(value) for value in mfu):
        axes.plot(at, [100 * value for value in mfu], color=_GREEN, linewidth=1)
        axes.set_ylabel("MFU (%)")
    else:
        axes.plot(at, _values(steps, "tokens_per_s"), color=_GREEN, linewidth=1)
        axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """NaN, which leaves a gap in a line, for what is not known."""
    return [float(v) if isinstance(v := row.get(key), (int, float)) else math.nan for row in rows]


def _smooth(values: Sequence[float], width: int) -> np.ndarray:
    """The mean of the finite ones among each value and its `width` neighbours on both sides; NaN without any."""
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    at = np.arange(len(values))
    first, last = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    known = counts[last] - counts[first]
    return np.divide(sums[last] - sums[first], known, out=np.full(len(values), math.nan), where=known > 0)
