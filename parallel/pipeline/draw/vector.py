"""Timelines as SVG, written by hand: one file without scripts, fonts or links, on a background of its own."""

from __future__ import annotations

from html import escape
from itertools import groupby

from ..simulate import Timeline
from .layout import picture
from .style import FRAME, Label, Polyline, Rect, Shape

_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def svg(timeline: Timeline, *, actual: Timeline | None = None, unit: str = "", title: str = "") -> str:
    """A picture of a timeline: a lane per rank, a box per computation, under it the activations that each rank holds.

    Args:
        timeline: what is planned, or the only thing to draw.
        actual: what really ran (`recorded.actual`), drawn under each planned lane on the same axis, both from 0.
        unit: of the times, for the axis ("ms").
        title: first line; the size of the program where empty.
    """
    drawn = picture(timeline, actual, unit=unit, title=title)
    width, height = _n(drawn.width), _n(drawn.height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="{_FONT}" role="img">',
        f"<title>{escape(title or 'Pipeline timeline')}</title>",
    ]
    for style, shapes in groupby(drawn.shapes, _style):
        lines += [f"<g{style}>", *map(_element, shapes), "</g>"]
    frame = f'x="0.5" y="0.5" width="{_n(drawn.width - 1)}" height="{_n(drawn.height - 1)}" rx="6"'
    lines += [f'<rect {frame} fill="none" stroke="{FRAME}"/>', "</svg>", ""]
    return "\n".join(lines)


def _style(shape: Shape) -> str:
    match shape:
        case Rect():
            return f' fill="{shape.fill}"'
        case Polyline():
            return f' fill="{shape.fill or "none"}" stroke="{shape.stroke}" stroke-width="{_n(shape.width)}"'
        case Label():
            bold = ' font-weight="600"' if shape.bold else ""
            return f' fill="{shape.fill}" font-size="{_n(shape.size)}" text-anchor="{shape.anchor}"{bold}'


def _element(shape: Shape) -> str:
    match shape:
        case Rect():
            path = f'<path d="M{_n(shape.x)} {_n(shape.y)}h{_n(shape.w)}v{_n(shape.h)}h{_n(-shape.w)}z"'
            return f"{path}><title>{escape(shape.tip)}</title></path>" if shape.tip else f"{path}/>"
        case Polyline():
            return f'<path d="{_path(shape)}"/>'
        case Label():
            # 0.35 em below the centre is the baseline of digits; dominant-baseline is not drawn alike everywhere.
            return f'<text x="{_n(shape.x)}" y="{_n(shape.y + 0.35 * shape.size)}">{escape(shape.text)}</text>'


def _path(line: Polyline) -> str:
    (x, y), *rest = line.points
    parts = [f"M{_n(x)} {_n(y)}"]
    for next_x, next_y in rest:
        if next_y == y:
            parts.append(f"H{_n(next_x)}")
        elif next_x == x:
            parts.append(f"V{_n(next_y)}")
        else:
            parts.append(f"L{_n(next_x)} {_n(next_y)}")
        x, y = next_x, next_y
    return "".join(parts)


def _n(value: float) -> str:
    """At most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
