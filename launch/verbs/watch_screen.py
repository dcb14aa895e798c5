"""The lines of `pentad watch`: pieces of text with a colour each, for a terminal or for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...trainer.metrics.formats import si
from ...trainer.metrics.readings.straggler import slowest
from ...trainer.metrics.readings.waterfall import waterfall_line
from .watch_state import JobView, RankState, rank_words, waited_axis

Piece = tuple[str, str]
"""A text and its colour: green, blue, cyan, magenta, yellow, red, grey, bold or plain."""

COLOURS = {
    RankState.COMPUTING: "green",
    RankState.WAITING: "blue",
    RankState.DATA: "yellow",
    RankState.CHECKPOINT: "magenta",
    RankState.EVALUATION: "cyan",
    RankState.STARTING: "cyan",
    RankState.ENDING: "grey",
    RankState.DONE: "grey",
    RankState.STEPS: "green",
    RankState.QUIET: "yellow",
    RankState.UNSEEN: "grey",
}
"""All others are red."""
_WORDS = {
    RankState.COMPUTING: "comp",
    RankState.CHECKPOINT: "save",
    RankState.EVALUATION: "eval",
    RankState.STARTING: "init",
    RankState.ENDING: "end",
    RankState.STOPPED: "STOP",
    RankState.DEAD: "DEAD",
    RankState.FAILED: "FAIL",
    RankState.FROZEN: "FROZ",
    RankState.LOST: "lost",
    RankState.STEPS: "steps",
    RankState.QUIET: "quiet",
    RankState.BLAMED: "FAULT",
    RankState.UNSEEN: "?",
}
_EVENTS = 6
_CELL = 11


def columns_of(view: JobView) -> int:
    """Cells of a line of the grid: the ranks of cp and tp side by side, where the axes are known."""
    return view.sizes[0] * view.sizes[1] if view.sizes else min(max(view.world, 1), 8)


def screen_lines(view: JobView, cursor: int, width: int = 120) -> list[list[Piece]]:
    """Everything, from top to bottom.

    Args:
        view: the job.
        cursor: the rank whose operation is shown.
        width: columns of the terminal.
    """
    across = max(min(columns_of(view), max((width - 14) // _CELL, 1)), 1)
    lines = [_title(view), *_numbers(view.row), []]
    lines += _grid(view, cursor, across)
    lines += [[], [(_cursor_words(view, cursor), "bold")], [], *_counts(view)]
    if view.events:
        lines += [[], [("events", "grey")], *([(_event(event), "plain")] for event in view.events[-_EVENTS:])]
    return lines


def plain_text(lines: Sequence[Sequence[Piece]]) -> str:
    """The text alone."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def _title(view: JobView) -> list[Piece]:
    axes = [f"{axis} {n}" for axis, n in zip(("tp", "cp", "dp", "pp"), view.sizes, strict=False) if n > 1]
    layout = f": {', '.join(axes)}" if axes else ""
    ranks = f"{view.world} rank{'s' * (view.world != 1)}"
    state = ("running", "green") if view.alive else ("ended", "grey")
    return [(view.name, "bold"), ("  ", "plain"), state, (f"  {ranks}{layout}", "plain")]


def _numbers(row: Mapping[str, Any]) -> list[list[Piece]]:
    """The last step's line, and where its time went."""
    if not row:
        return [[("no step has been reported yet", "grey")]]
    known = {
        key: value for key, value in row.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    words = [f"step {known['step']:,.0f}"] if "step" in known else []
    shows = {
        "loss": lambda v: f"loss {v:.4f}",
        "grad_norm": lambda v: f"gnorm {v:.3g}",
        "mfu": lambda v: f"MFU {100 * v:.2f}%",
        "tokens_per_s": lambda v: f"{si(v)} tok/s",
        "step_time_s": lambda v: f"{v:.3g} s/step",
        "memory_gib": lambda v: f"mem {v:.3g}G",
    }
    words += [show(known[key]) for key, show in shows.items() if key in known]
    straggler = row.get("straggler")
    if isinstance(straggler, dict) and isinstance(straggler.get("rank"), int):
        words.append(f"slowest {_or(lambda: slowest(straggler))}")
    lines: list[list[Piece]] = [[("   ".join(words), "plain")]]
    fall = row.get("waterfall")
    if isinstance(fall, dict):
        lines.append([(_or(lambda: waterfall_line(0, fall)).strip(), "grey")])
    return lines


def _or(made: Any) -> str:
    """A text made of what a file says; empty where that is not what a run writes."""
    try:
        return made()
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return ""


def _grid(view: JobView, cursor: int, across: int) -> list[list[Piece]]:
    lines: list[list[Piece]] = []
    for first in range(0, view.world, across):
        line: list[Piece] = [(_row_name(view, first).ljust(14), "grey")]
        for rank in range(first, min(first + across, view.world)):
            text, colour = _cell(view, rank)
            left, right = ("[", "]") if rank == cursor else (" ", " ")
            line.append((f"{left}{text:<{_CELL - 2}}{right}", colour))
        lines.append(line)
    return lines


def _row_name(view: JobView, rank: int) -> str:
    """`pp 1 dp 0`: where a line of the grid lies on the slower axes."""
    if not view.sizes:
        return ""
    tp, cp, dp, pp = view.sizes
    inner = rank // (tp * cp)
    return " ".join(f"{axis} {at}" for axis, size, at in (("pp", pp, inner // dp), ("dp", dp, inner % dp)) if size > 1)


def _cell(view: JobView, rank: int) -> Piece:
    stand, state = view.stands.get(rank), view.state(rank)
    axis = "" if stand is None else waited_axis(stand)
    word = f"~{axis[:5]}" if axis else _WORDS.get(state, state.value)
    return f"{rank:>2} {word}", COLOURS.get(state, "red")


def _cursor_words(view: JobView, cursor: int) -> str:
    if cursor in view.stands:
        return rank_words(view.stands[cursor], view.places)
    return view.far[cursor].words if cursor in view.far else f"rank {cursor}: nothing is known of it here"


def _counts(view: JobView) -> list[list[Piece]]:
    """How many ranks are at what: the legend too."""
    counts: dict[tuple[str, str], int] = {}
    for rank in range(view.world):
        stand, state = view.stands.get(rank), view.state(rank)
        axis = "" if stand is None else waited_axis(stand)
        key = f"{state.value}{f' for {axis} (~{axis[:5]})' if axis else ''}", COLOURS.get(state, "red")
        counts[key] = counts.get(key, 0) + 1
    pieces: list[Piece] = []
    for (words, colour), count in sorted(counts.items(), key=lambda each: -each[1]):
        pieces += [(f"{count} {words}", colour), ("   ", "plain")]
    return [pieces]


def _event(event: Mapping[str, Any]) -> str:
    kind, step = event.get("event", ""), event.get("step")
    rest = "  ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event", "step"))
    text = f"  step {step}  {kind}  {rest}"
    return "".join(letter if letter.isprintable() else " " for letter in text)
