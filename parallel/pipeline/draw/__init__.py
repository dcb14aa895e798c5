"""Pictures of a program's timeline, planned or recorded: SVG, PNG, characters, and a trace for chrome://tracing."""

from __future__ import annotations

from .raster import png
from .terminal import terminal
from .trace import chrome_trace
from .vector import svg

__all__ = ["chrome_trace", "png", "svg", "terminal"]
