"""Timelines in characters."""

from __future__ import annotations

from ..kind import Kind
from ..needs import KINDS
from ..simulate import Timeline
from .figures import OpBox, chunk_of, figures, op_boxes
from .layout import ticks
from .style import number, on, rgb, shade

_Cell = tuple[str, tuple[Kind, int] | None]
"""A character, and the kind and chunk of the operation under it."""

_RESET = "\x1b[0m"


def terminal(timeline: Timeline, width: int = 120, *, colour: bool = False, unit: str = "") -> str:
    """Rows of characters, one per rank, of at most `width` columns, with an axis and a legend.

    An operation is a letter and its microbatch ("F3"; lower case on later chunks) as far as its columns go, idle time
    a dot. With `colour` (24-bit ANSI) the letter is left out and the kind is the background.
    """
    found = [box for box in op_boxes(timeline) if box.op.kind.computes]
    ranks = len(timeline.program.ranks)
    margin = len(f"rank {ranks - 1}") + 2
    end = figures(timeline).end
    if not found or not end:
        return "nothing is computed\n"
    scale = _scale(found, end, max(width - margin, 10))
    rows: list[list[_Cell]] = [[("·", None)] * round(end * scale) for _ in range(ranks)]
    chunk, chunks = chunk_of(timeline), timeline.program.chunks
    for box in found:
        first, last = round(box.start * scale), round(box.end * scale)
        which = chunk[box.op.stage] if box.op.stage >= 0 else 0
        text = _text(box, last - first, which, colour)
        rows[box.rank][first:last] = [(character, (box.op.kind, which)) for character in text]
    lines = [_header(timeline, unit)]
    for rank, cells in enumerate(rows):
        body = _coloured(cells, chunks) if colour else "".join(c for c, _ in cells)
        lines.append(f"rank {rank}".ljust(margin) + body)
    lines += [" " * margin + line for line in _axis(end, scale)]
    lines.append(" " * margin + _legend({box.op.kind for box in found}, chunks, colour))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _scale(found: list[OpBox], end: float, columns: int) -> float:
    """Columns per unit of time: whole columns for the shortest operation where there is room for them."""
    scale = columns / end
    shortest = min((b.end - b.start for b in found if b.op.kind.of_stage), default=end)
    cells = shortest * scale
    return int(cells + 1e-9) / shortest if 1 <= cells + 1e-9 < 12 else scale if cells < 1 else 12 / shortest


def _text(box: OpBox, columns: int, chunk: int, colour: bool) -> str:
    digits = str(box.op.index)
    letter = box.op.kind.letter or box.op.kind.token
    letter = letter.lower() if chunk else letter
    if colour:
        text = digits if len(digits) <= columns else digits[-1]
    else:
        text = letter + digits if len(digits) < columns else letter
    return text[:columns].ljust(columns)


def _coloured(cells: list[_Cell], chunks: int) -> str:
    parts, before = [], None
    for character, key in cells:
        if key != before:
            parts.append(_RESET if key is None else _ansi(*key, chunks))
            before = key
        parts.append(character)
    return "".join(parts) + _RESET


def _ansi(kind: Kind, chunk: int, chunks: int) -> str:
    r, g, b = rgb(kind, chunk, chunks)
    ink = "97" if on(shade(kind, chunk, chunks)) == "#ffffff" else "30"
    return f"\x1b[{ink};48;2;{r};{g};{b}m"


def _header(timeline: Timeline, unit: str) -> str:
    program, stated = timeline.program, figures(timeline)
    chunks = f" × {program.chunks} chunks" if program.chunks > 1 else ""
    makespan = f"{number(timeline.makespan)} {unit}".strip()
    return (
        f"{len(program.ranks)} ranks × {program.microbatches} microbatches{chunks}   makespan {makespan}   "
        f"bubble {stated.bubble:.1%}   peak {number(max(stated.peak))} microbatches"
    )


def _axis(end: float, scale: float) -> tuple[str, str]:
    columns = round(end * scale)
    line, names = ["─"] * (columns + 1), [" "] * (columns + 12)
    for tick in ticks(end, columns / 12):
        at, text = round(tick * scale), number(tick)
        line[at] = "┴" if at else "└"
        names[at : at + len(text)] = text
    return "".join(line), "".join(names)


def _legend(kinds: set[Kind], chunks: int, colour: bool) -> str:
    parts = []
    for kind in KINDS.values():
        if kind in kinds:
            letter = kind.letter or kind.token
            mark = f"{_ansi(kind, 0, chunks)} {letter} {_RESET}" if colour else letter
            parts.append(f"{mark} {kind.words}")
    later = "lighter: later chunk" if colour else "lower case: later chunk"
    return "   ".join([*parts, "· idle", *([later] if chunks > 1 else [])])
