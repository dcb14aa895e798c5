"""Where everything stands in the picture of a timeline. The renderers only draw the shapes that this module places."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..memory import activation_curve
from ..needs import KINDS, Kinds
from ..simulate import Curve, Timeline
from .figures import Figures, OpBox, causes, chunk_of, copies, figures, op_boxes
from .style import (
    CAUSE,
    CURVE,
    CURVE_EDGE,
    FAINT,
    FRAME,
    GRID,
    INK,
    LANE,
    MUTED,
    PAPER,
    REAL_EDGE,
    UPDATE_HUE,
    Drawing,
    Label,
    Polyline,
    Rect,
    number,
    on,
    shade,
)

_LEFT, _RIGHT, _TOP = 80, 60, 88
_PLOT = (700.0, 2000.0)
_DIGIT = 0.62  # width of a digit in ems: the wider of the fonts that the renderers meet
_TIPS = 5000  # boxes; each tip costs an SVG some 30 bytes
_CAUSES = 260
_COPY = 3.0  # pixels; height of a copy under its rank's lane
_ENGINES = ("out", "in", "store", "get", "collect")  # whose copies are drawn under each other
_SHORT_BOX = 20  # pixels of a short pass, where the picture is not too wide then


@dataclass(frozen=True)
class _Frame:
    """Geometry of one picture: `x(t) = _LEFT + t · scale`; a rank's lanes start at `_TOP + rank · pitch`."""

    scale: float
    width: float
    end: float
    lane: float
    inner: float
    gap: float
    lanes: int
    ranks: int
    memory: float

    @property
    def pitch(self) -> float:
        return self.lanes * self.lane + (self.lanes - 1) * self.inner + self.gap

    def x(self, time: float) -> float:
        return _LEFT + time * self.scale

    def y(self, rank: int, lane: int = 0) -> float:
        return _TOP + rank * self.pitch + lane * (self.lane + self.inner)

    @property
    def bottom(self) -> float:
        """Lower edge of the last lane."""
        return _TOP + self.ranks * self.pitch - self.gap

    @property
    def memory_top(self) -> float:
        return self.bottom + 60


def picture(timeline: Timeline, actual: Timeline | None = None, *, unit: str = "", title: str = "") -> Drawing:
    """The shapes of a timeline's picture, or of a planned one above a real one on the same axis."""
    timelines = [timeline] if actual is None else [timeline, actual]
    drawn = [op_boxes(one) for one in timelines]
    stated = [figures(one) for one in timelines]
    frame = _frame(timelines, drawn)
    height = frame.memory_top + frame.ranks * (frame.memory + 5) + 16
    result = Drawing(_LEFT + frame.width + _RIGHT, height)
    shapes = result.shapes
    shapes.append(Rect(0, 0, result.width, result.height, PAPER))
    shapes += _header(timeline, stated, unit, title, result.width)
    shapes += _legend(timeline, [*drawn, copies(timeline)], result.width)
    shapes += _lanes(frame, stated)
    shapes += _axis(frame, unit)
    many = sum(map(len, drawn)) > _TIPS
    if actual is None:
        shapes += _causes(frame, timeline)
    shapes += _copies(frame, copies(timeline), tips=not many)
    for lane, (one, found) in enumerate(zip(timelines, drawn, strict=True)):
        shapes += _operations(frame, one, found, lane, tips=not many)
    shapes += _memory(frame, timelines, stated)
    return result


def _frame(timelines: list[Timeline], drawn: list[list[OpBox]]) -> _Frame:
    end = max(max(one.makespan for one in timelines), 1e-12)
    widths = sorted(box.end - box.start for box in drawn[0] if box.op.kind.of_stage) or [end]
    width = min(max(_SHORT_BOX * end / widths[len(widths) // 4], _PLOT[0]), _PLOT[1])
    ranks, lanes = len(timelines[0].program.ranks), len(timelines)
    lane = 24.0 if ranks <= 8 else 22.0 if ranks <= 16 else 16.0 if ranks <= 32 else 11.0
    lane = lane if lanes == 1 else max(lane * 0.75, 10.0)
    gap = (6.0 if ranks <= 16 else 3.0) if lanes == 1 else 9.0
    strips = max((1 + _ENGINES.index(box.op.kind.engine) for box in copies(timelines[0])), default=0)
    gap += (_COPY + 1) * max(2, strips) if strips else 0.0
    memory = 22.0 if ranks <= 8 else 15.0 if ranks <= 16 else 9.0
    memory *= 2 if all(one.held for one in timelines) else 1
    return _Frame(width / end, width, end, lane, 1.5, gap, lanes, ranks, memory)


def _header(timeline: Timeline, stated: list[Figures], unit: str, title: str, width: float) -> list[Label]:
    program, plan = timeline.program, stated[0]
    size = f"{_count(len(program.ranks), 'rank')} × {_count(program.microbatches, 'microbatch')}"
    size += f" × {program.chunks} chunks" if program.chunks > 1 else ""
    vocab = f", vocabulary balanced ({_count(program.vocab_barriers, 'barrier')})" if program.vocab_barriers else ""
    facts = [f"makespan {_time(timeline.makespan, unit)}"]
    if timeline.makespan > plan.end * (1 + 1e-9):
        facts += [f"computation until {_time(plan.end, unit)}"]
    if len(stated) > 1:
        real = stated[1]
        ratio = f" ({real.end / plan.end - 1:+.1%})" if plan.end else ""
        facts = [f"planned {_time(plan.end, unit)}", f"actual {_time(real.end, unit)}{ratio}"]
    # Of one rank in both: the rank with the longest span may be another one in the real step.
    rank = f" on rank {plan.longest}" if len(stated) > 1 else ""
    facts += ["bubble " + " → ".join(f"{one.idle[plan.longest]:.1%}" for one in stated) + rank]
    facts += [f"peak {number(max(plan.peak))} microbatches of activations"]
    if title:
        facts = [size + vocab, *facts]
    line = "  ·  ".join(facts)
    return [
        Label(16, 22, title or size + vocab, 16, INK, "start", bold=True),
        Label(16, 43, line, min(12.0, 11 * (width - 32) / _width(line)), MUTED, "start"),
    ]


def _legend(timeline: Timeline, drawn: list[list[OpBox]], width: float) -> list[Rect | Label]:
    kinds = {box.op.kind for found in drawn for box in found}
    shapes: list[Rect | Label] = []
    x, y, chunks = 16.0, 64.0, timeline.program.chunks
    entries = [(kind.token, kind.words, kind) for kind in KINDS.values() if kind.hue and kind in kinds]
    entries += [("", "update", Kinds.OPTIMIZE)] if any(kind.updates for kind in kinds) else []
    for short, words, kind in entries:
        shades = list(dict.fromkeys(shade(kind, chunk, chunks) for chunk in range(chunks)))
        part = max(14.0 / len(shades), 5.0)
        for fill in shades:
            shapes.append(Rect(x, y - 6, part, 12, fill))
            x += part
        text = f"{short} {words}".strip()
        shapes.append(Label(x + 5, y, text, 11, INK, "start"))
        x += 5 + _width(text) + 16
    shapes += [Rect(x, y - 6, 14, 12, LANE), Label(x + 19, y, "idle", 11, INK, "start")]
    x += 19 + _width("idle") + 16
    if chunks > 1 and x + 190 < width:
        shapes.append(Label(x, y, "lighter: later chunk", 11, MUTED, "start"))
    return shapes


def _lanes(frame: _Frame, stated: list[Figures]) -> list[Rect | Label]:
    shapes: list[Rect | Label] = []
    size = min(11.0, frame.lane * 0.8)
    right = _LEFT + frame.width
    shapes.append(Label(right + 46, _TOP - 10, "idle", 10, FAINT, "end"))
    for rank in range(frame.ranks):
        top = frame.y(rank)
        shapes.append(Label(frame.lanes * -28 + _LEFT + 20, top + frame.lane / 2, f"rank {rank}", size, INK, "end"))
        for lane, one in enumerate(stated):
            y = frame.y(rank, lane)
            shapes.append(Rect(_LEFT, y, frame.width, frame.lane, LANE))
            middle = y + frame.lane / 2
            if frame.lanes > 1:
                shapes.append(Label(_LEFT - 6, middle, ("plan", "real")[lane], min(9.5, size), MUTED, "end"))
            shapes.append(Label(right + 46, middle, f"{one.idle[rank]:.1%}", size, MUTED, "end"))
    return shapes


def _axis(frame: _Frame, unit: str) -> list[Polyline | Label]:
    shapes: list[Polyline | Label] = []
    y = frame.bottom + 6
    for tick in ticks(frame.end, frame.width / 75):
        x = frame.x(tick)
        shapes.append(Polyline(((x, _TOP), (x, frame.bottom)), GRID, 0.8))
        shapes.append(Polyline(((x, y), (x, y + 4)), FAINT))
        shapes.append(Label(x, y + 13, number(tick), 10.5, MUTED))
    shapes.append(Polyline(((_LEFT, y), (_LEFT + frame.width, y)), FAINT))
    shapes.append(Label(_LEFT + frame.width + 46, y + 13, unit or "time", 10.5, MUTED, "end"))
    return shapes


def ticks(end: float, at_most: float) -> list[float]:
    """Round times from 0 to `end`, about `at_most` of them."""
    raw = end / max(at_most, 2)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * (1 - 1e-9))
    return [i * step for i in range(int(end / step * (1 + 1e-9)) + 1)]


def _operations(frame: _Frame, timeline: Timeline, found: list[OpBox], lane: int, *, tips: bool) -> list[Rect | Label]:
    chunk, chunks = chunk_of(timeline), timeline.program.chunks
    rects, labels = [], []
    for box in found:
        op = box.op
        fill = UPDATE_HUE if op.kind.updates else shade(op.kind, chunk[op.stage] if op.stage >= 0 else 0, chunks)
        x, y = frame.x(box.start), frame.y(box.rank, lane)
        w = frame.x(box.end) - x
        # A hair of background between neighbours; none where boxes are too thin to spare it.
        seam = 0.8 if w > 5 else 0.4 if w > 2 else 0.0
        tip = f"{op}  {number(box.start)} – {number(box.end)}" if tips else ""
        rects.append(Rect(x + seam / 2, y, w - seam, frame.lane, fill, tip))
        if op.kind.updates:
            continue
        text = str(op.index)
        size = min(frame.lane * 0.52, 11.5, (w - 1.5) / (_DIGIT * len(text)))
        if size >= 6:
            labels.append(Label(x + w / 2, y + frame.lane / 2, text, math.floor(size * 2) / 2, on(fill)))
    # Sorted, so that the renderers state a colour once for many boxes.
    return sorted(rects, key=lambda r: (r.fill, r.y, r.x)) + sorted(labels, key=lambda s: (s.fill, s.size, s.y, s.x))


def _copies(frame: _Frame, found: list[OpBox], *, tips: bool) -> list[Rect]:
    """Strips under the ranks' lanes: to the host, to the device, to the disk, from the disk."""
    rects = []
    for box in found:
        y = frame.y(box.rank, frame.lanes - 1) + frame.lane + 1 + (_COPY + 1) * _ENGINES.index(box.op.kind.engine)
        tip = f"{box.op}  {number(box.start)} – {number(box.end)}" if tips else ""
        x = frame.x(box.start)
        rects.append(Rect(x, y, frame.x(box.end) - x, _COPY, shade(box.op.kind), tip))
    return sorted(rects, key=lambda r: (r.fill, r.y, r.x))


def _causes(frame: _Frame, timeline: Timeline) -> list[Polyline]:
    """From what a rank waited for to what it waited with: the reason of each wait, where there are few enough."""
    found = list(causes(timeline, frame.end * 1e-6))
    if len(found) > _CAUSES or frame.lane < 16:
        return []
    lines = []
    for source, target in found:
        down = target.rank > source.rank
        start = frame.x(source.end), frame.y(source.rank) + (frame.lane if down else 0)
        end = frame.x(target.start), frame.y(target.rank) + (0 if down else frame.lane)
        lines.append(Polyline((start, end), CAUSE, 0.7))
    return lines


def _memory(frame: _Frame, timelines: list[Timeline], stated: list[Figures]) -> list[Rect | Polyline | Label]:
    top = frame.memory_top
    counted = all(timeline.held for timeline in timelines)
    curves = [_mebibytes(timeline) if counted else activation_curve(timeline) for timeline in timelines]
    peaks = [[max((level for _, level in curve), default=0.0) for curve in each] for each in curves]
    what = "activations held (microbatches)" if not counted else "held on the device (MiB)"
    what += "; filled: plan, line: real" if frame.lanes > 1 else ""
    shapes: list[Rect | Polyline | Label] = [
        Label(_LEFT, top - 14, what, 11, MUTED, "start"),
        Label(_LEFT + frame.width + 46, top - 14, "peak", 10, FAINT, "end"),
    ]
    if not counted:
        peaks = [list(one.peak) for one in stated]
    ceiling = max(1.0 if not counted else 0.0, *(peak for each in peaks for peak in each))
    size = min(11.0, frame.memory * 0.95)
    for rank in range(frame.ranks):
        y = top + rank * (frame.memory + 5)
        base = y + frame.memory
        shapes.append(Label(_LEFT - 8, y + frame.memory / 2, f"rank {rank}", size, INK, "end"))
        for lane in range(frame.lanes):
            steps = _steps(frame, curves[lane][rank], base, frame.memory / ceiling)
            if not steps:
                continue
            edge, fill = (CURVE_EDGE, CURVE) if lane == 0 else (REAL_EDGE, "")
            shapes.append(Polyline(steps, edge, 1.0, fill))
        shapes.append(Polyline(((_LEFT, base), (_LEFT + frame.width, base)), FRAME))
        text = " → ".join(dict.fromkeys(f"{each[rank]:.3g}" if counted else number(each[rank]) for each in peaks))
        shapes.append(Label(_LEFT + frame.width + 46, y + frame.memory / 2, text, size, MUTED, "end"))
    return shapes


def _mebibytes(timeline: Timeline) -> tuple[Curve, ...]:
    return tuple(tuple((time, nbytes / 2**20) for time, nbytes in curve) for curve in timeline.held)


_Points = tuple[tuple[float, float], ...]


def _steps(frame: _Frame, curve: Curve, base: float, scale: float) -> _Points:
    """The curve's outline. Changes within half a pixel are one: a pass that ends as the next begins makes no dip."""
    merged: list[tuple[float, float]] = []
    for time, level in curve:
        x = frame.x(time)
        if merged and x - merged[-1][0] < 0.5:
            x = merged.pop()[0]
        merged.append((x, base - level * scale))
    points, y = [], base
    for x, after in merged:
        points += [(x, y), (x, after)]
        y = after
    return tuple(points)


def _width(text: str) -> float:
    """About how wide a text of size 11 is."""
    return sum(3.4 if c in "fijlrt ,:" else 9.4 if c in "mwW" else 6.6 for c in text)


def _count(n: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{n} {noun if n == 1 else plural}"


def _time(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()
