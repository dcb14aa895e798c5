"""The console: one line a step, at most 120 columns wide."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import IO

from ..formats import si
from ..metric import Column, Metric
from ..notices import warn
from ..report import Report, Shown

_WIDTH = 120
_STEP, _STEP_WIDTH = "step/total", 17
_SKIP = "SKIP"
_ALERT = "1;31"


class ConsoleSink:
    """One line a step; the titles first, and again every 40 lines on a terminal.

    A metric whose column has no more room is left out, and named once.
    """

    def __init__(self, total_steps: int, every: int = 1, stream: IO[str] | None = None) -> None:
        """every: steps between lines; the first of this process, the last and skipped steps are always shown."""
        self._stream = stream if stream is not None else sys.stdout
        self._total, self._every = total_steps, max(1, every)
        self._color = use_color(self._stream)
        self._lines = 0
        self._metrics: list[Metric] = []

    def log(self, report: Report) -> None:
        if self._lines and report.step % self._every and report.step != self._total and not report.skipped:
            return
        if not self._lines:
            metrics = [shown.metric for shown in report.shown]
            self._metrics = fitting(metrics, self._total)
            for metric in metrics:
                if metric.column is not None and metric not in self._metrics:
                    warn(f"the console has no room for the column {metric.column.title!r} of {metric.key}")
        if not self._lines or (self._stream.isatty() and self._lines % 40 == 0):
            print(console_header(self._metrics, self._total), file=self._stream)
        self._lines += 1
        print(console_line(report, self._metrics, self._total, color=self._color), file=self._stream, flush=True)
        self.add(report)

    def add(self, report: Report) -> None:
        for shown in report.shown:
            if shown.line:
                print(shown.line, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


def fitting(metrics: Sequence[Metric], total_steps: int) -> list[Metric]:
    """Those that have a column, from left to right, as long as there is room: earlier metrics have it first."""
    room, found = _WIDTH - _step_width(total_steps) - len(f" {_SKIP}"), []
    for metric in metrics:
        if metric.column is not None and metric.column.width + 1 <= room:
            room -= metric.column.width + 1
            found.append(metric)
    return sorted(found, key=lambda metric: _column(metric).order)


def console_header(metrics: Sequence[Metric], total_steps: int) -> str:
    """The titles over `console_line`."""
    titles = [_cut(column.title, column.width) for column in map(_column, metrics)]
    return " ".join([_STEP.rjust(_step_width(total_steps)), *titles])


def console_line(report: Report, metrics: Sequence[Metric], total_steps: int, *, color: bool = False) -> str:
    """One step in fixed columns, at most 120 of them without the colours; of a skipped step it ends in SKIP.

    Args:
        report: the step.
        metrics: that have a column each, from left to right.
        total_steps: of the job.
        color: whether to colour it.
    """
    position = f"{report.step}/{total_steps}"
    if len(position) > _STEP_WIDTH:
        position = f"{si(report.step)}/{si(total_steps)}"
    shown = {s.metric.key: s for s in report.shown}
    cells = [position.rjust(_step_width(total_steps))]
    cells += [_cell(_column(metric), shown[metric.key], color) for metric in metrics]
    if report.skipped:
        cells.append(_paint(_SKIP, _ALERT, color))
    return " ".join(cells)


def use_color(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to colour: a terminal, and NO_COLOR (no-color.org) is unset or empty."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def _column(metric: Metric) -> Column:
    if metric.column is None:
        raise ValueError(f"{metric.key} has no column")
    return metric.column


def _cell(column: Column, shown: Shown, color: bool) -> str:
    code = _ALERT if shown.alarming else column.colour
    return _paint(_cut(shown.cell, column.width), code, color and shown.cell != "-")


def _cut(text: str, width: int) -> str:
    """To the right of its column; of a text that is too long the beginning."""
    return text.rjust(width) if len(text) <= width else text[: width - 1] + "…"


def _step_width(total_steps: int) -> int:
    return max(len(_STEP), min(_STEP_WIDTH, 2 * len(str(total_steps)) + 1))


def _paint(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
