"""The picture of how slow each rank was over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_DEEPEST = 20
"""Percent; what is slower looks the same, so that pictures can be compared."""


def draw_stragglers(axes: Any, steps: Sequence[int], slower: np.ndarray) -> Any:
    """Draws a heat map, blue for ranks that are faster than their peers, red for slower ones; returns what was drawn.

    Args:
        axes: matplotlib's.
        steps: the last one of each window.
        slower: (windows, ranks) fractions that each rank was slower than its peers by.
    """
    drawn = axes.imshow(
        100 * slower.T, cmap="RdBu_r", vmin=-_DEEPEST, vmax=_DEEPEST, aspect="auto", interpolation="nearest"
    )
    ranks = slower.shape[1]
    shown = range(0, ranks, max(1, ranks // 32))
    axes.set_yticks(list(shown), [str(rank) for rank in shown], fontsize=7)
    marked = range(0, len(steps), max(1, len(steps) // 10))
    axes.set_xticks(list(marked), [str(steps[window]) for window in marked], fontsize=7)
    axes.set(xlabel="step (end of the window)", ylabel="rank")
    return drawn


def straggler_image(steps: Sequence[int], slower: np.ndarray) -> np.ndarray:
    """`draw_stragglers` as a picture (height, width, 3) of bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = min(1.6 + 0.22 * slower.shape[1], 12.0)
    figure = Figure(figsize=(min(4.5 + 0.12 * len(steps), 14.0), height), dpi=100, layout="constrained")
    axes = figure.subplots()
    drawn = draw_stragglers(axes, steps, slower)
    axes.set_title("how much slower than its peers, %", fontsize=9, loc="left")
    figure.colorbar(drawn, ax=axes, extend="both")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
