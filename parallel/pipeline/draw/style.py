"""Colours and words of the pictures, and the few shapes that both renderers draw."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..kind import Kind

INK, MUTED, FAINT = "#1f2430", "#667085", "#98a1b0"
PAPER, LANE, GRID, FRAME = "#ffffff", "#dfe4ec", "#cbd2dc", "#d0d5dd"
CAUSE, CURVE, CURVE_EDGE, REAL_EDGE = "#475467", "#c9d3e6", "#5b76a8", "#c2410c"

UPDATE_HUE = "#8d95a3"
_LIGHTEST = 0.54


@dataclass(frozen=True, slots=True)
class Rect:
    """A filled rectangle; `tip` is shown under the pointer where the renderer can."""

    x: float
    y: float
    w: float
    h: float
    fill: str
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Polyline:
    """Straight lines through points, filled where `fill` is given."""

    points: tuple[tuple[float, float], ...]
    stroke: str
    width: float = 1.0
    fill: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """Text around a vertical centre; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    size: float
    fill: str = INK
    anchor: str = "middle"
    bold: bool = False


Shape = Rect | Polyline | Label


@dataclass
class Drawing:
    """Shapes in drawing order, in pixels, y downwards."""

    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)


def shade(kind: Kind, chunk: int = 0, chunks: int = 1) -> str:
    """Colour of a kind, lighter for later chunks."""
    if not kind.hue:
        return UPDATE_HUE
    share = _LIGHTEST * chunk / max(chunks - 1, 2) if kind.of_stage else 0.0
    return "#" + "".join(f"{round(v + (255 - v) * share):02x}" for v in _channels(kind.hue))


def on(fill: str) -> str:
    """The text colour with more contrast on a fill (WCAG 2 relative luminance)."""
    r, g, b = (_linear(v / 255) for v in _channels(fill))
    light = 0.2126 * r + 0.7152 * g + 0.0722 * b
    return "#ffffff" if 1.05 / (light + 0.05) >= (light + 0.05) / (_INK_LUMINANCE + 0.05) else INK


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


_INK_LUMINANCE = 0.018


def rgb(kind: Kind, chunk: int, chunks: int) -> tuple[int, int, int]:
    """`shade` as three numbers of 0 to 255."""
    return _channels(shade(kind, chunk, chunks))


def number(value: float) -> str:
    """At most four significant digits, never in powers of ten."""
    text = f"{value:.4g}"
    return f"{value:,.0f}" if "e" in text else text
