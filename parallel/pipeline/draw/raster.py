"""Timelines as PNG, by matplotlib: the same shapes as the SVG."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from ..simulate import Timeline
from .layout import picture
from .style import Drawing, Label, Polyline, Rect

_ANCHOR = {"start": "left", "middle": "center", "end": "right"}
_POINTS = 72 / 100  # matplotlib's font sizes and line widths are points; a figure of 100 dpi makes a pixel 0.72 of one


def png(
    timeline: Timeline,
    path: str | Path,
    *,
    actual: Timeline | None = None,
    unit: str = "",
    title: str = "",
    zoom: float = 2.0,
) -> None:
    """Writes the picture of `svg` as a PNG file, `zoom` times as large in pixels."""
    drawn = picture(timeline, actual, unit=unit, title=title)
    _render(drawn, Path(path), zoom)


def _render(drawn: Drawing, path: Path, zoom: float) -> None:
    # Imported here: whoever only simulates does not wait for it. No pyplot: it keeps figures in the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(drawn.width / 100, drawn.height / 100), dpi=100 * zoom)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, drawn.width)
    axes.set_ylim(drawn.height, 0)
    axes.axis("off")
    for order, (kind, group) in enumerate(groupby(drawn.shapes, type)):
        shapes = list(group)
        if kind is Rect:
            rects = [shape for shape in shapes if isinstance(shape, Rect)]
            corners = [[(r.x, r.y), (r.x + r.w, r.y), (r.x + r.w, r.y + r.h), (r.x, r.y + r.h)] for r in rects]
            fills = [r.fill for r in rects]
            axes.add_collection(PolyCollection(corners, facecolors=fills, edgecolors="none", zorder=order))
        elif kind is Polyline:
            lines = [shape for shape in shapes if isinstance(shape, Polyline)]
            for line in lines:
                if line.fill:
                    axes.add_collection(PolyCollection([line.points], facecolors=line.fill, zorder=order))
            drawing = LineCollection(
                [line.points for line in lines],
                linewidths=[line.width * _POINTS for line in lines],
                colors=[line.stroke for line in lines],
                zorder=order,
            )
            axes.add_collection(drawing)
        else:
            for label in shapes:
                if isinstance(label, Label):
                    weight = "bold" if label.bold else "normal"
                    axes.text(
                        label.x,
                        label.y + 0.35 * label.size,
                        label.text,
                        fontsize=label.size * _POINTS * 0.93,
                        color=label.fill,
                        ha=_ANCHOR[label.anchor],
                        va="baseline",
                        weight=weight,
                        zorder=order,
                    )
    figure.savefig(path, format="png")
