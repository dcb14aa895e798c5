"""What a metric is: its key, its unit, what it means and where it is shown. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
class Alert:
    """A value that somebody should hear of at once: trackers that can send messages do, and it is an event.

    Args:
        title, text: of the message.
        event: its name in events.jsonl.
        fields: the event's own.
    """

    title: str
    text: str
    event: str
    fields: Mapping[str, Any]


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
            value that is known, under this key and a slash, and so on inside it. None: they do not get it.
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
        if self.tracker is None or value is None or isinstance(value, Alert):
            return {}
        if not isinstance(value, Mapping):
            return {self.tracker: value}
        return dict(_flat(self.tracker, value))


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(f"{key}/{name}", part)
    elif value is not None:
        yield key, value
