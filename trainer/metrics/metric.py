"""What a metric is: its key, its unit, what it means and where it is shown. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Picture:
    """A value that trackers show as a picture.

    Args:
        pixels: (height, width, 3) bytes.
    """

    pixels: np.ndarray


@dataclass(frozen=True)
class Column:
    """A metric's place on the console's line.

    Args:
        title: over the column.
        width: in characters; a title or text that is longer is cut.
        show: the text of a value that is known.
        colour: SGR code, "36" for cyan.
        order: columns stand in the order of these; those of `pentad` itself have 10 to 90, and 120 for `eta`.
        unknown: the text where the value is not known.
    """

    title: str
    width: int
    show: Callable[[Any], str]
    _: KW_ONLY
    colour: str = "39"
    order: float = 110
    unknown: str = "-"


@dataclass(frozen=True)
class Metric:
    """One value that a step, or what follows on it, has.

    Args:
        key: in metrics.jsonl; no other metric of a run has it.
        text: what it means, for docs/metrics.md.
        unit: of the value.
        in_file: whether metrics.jsonl has it.
        tracker: its key in W&B and TensorBoard, which get numbers, `Picture`s and text; of a mapping they get every
            value that is known, under this key and a slash. None: they do not get it.
        over: the trackers' key of the values that its chart is drawn over, where a tracker can; None: over the steps.
        column: its place on the console's line.
        line: (step, value) → a line of its own on the console, under the step's.
    """

    key: str
    text: str
    _: KW_ONLY
    unit: str = ""
    in_file: bool = True
    tracker: str | None = None
    over: str | None = None
    column: Column | None = None
    line: Callable[[int, Any], str] | None = None

    def tracked(self, value: Any) -> Mapping[str, Any]:
        """What trackers get of a value, by their keys."""
        if self.tracker is None or value is None:
            return {}
        if not isinstance(value, Mapping):
            return {self.tracker: value}
        return {f"{self.tracker}/{key}": part for key, part in value.items() if part is not None}
