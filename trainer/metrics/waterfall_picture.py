"""The pictures of where a run's time went, from its metrics.jsonl: over the steps, and on the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..run_folder import RunFile
from .heat_map import draw_stragglers
from .readings.waterfall import ORDER
from .summary import lines_of

PART_COLOURS = {
    "model": "#047857", "below_ceiling": "#6ee7b7", "compute": "#34d399", "recompute": "#a3e635",
    "bubble_planned": "#9ca3af", "bubble_unplanned": "#4b5563",
    "tp": "#1d4ed8", "cp": "#3b82f6", "ep": "#60a5fa", "pp": "#93c5fd", "dp": "#1e3a8a", "vocabulary": "#c7d2fe",
    "straggler": "#dc2626", "offload": "#f59e0b", "optimizer": "#a855f7", "data": "#f97316", "checkpoint": "#78350f",
    "snapshot": "#0891b2", "gc": "#db2777", "contention": "#fb7185", "report": "#d6d3d1", "other": "#e7e5e4",
}  # fmt: skip
"""Of the parts of a waterfall, in all pictures."""
_COLUMNS = 400
"""Steps are averaged to at most so many columns of the picture."""
_NAMED_FROM = 0.005


def draw_waterfall(run: Path) -> Path | None:
    """Draws `waterfall.png` into the run's folder; none where fewer than two steps have a waterfall."""
    found = [(w, row["step"]) for row in lines_of(run / RunFile.METRICS) if isinstance(w := row.get("waterfall"), dict)]
    if len(found) < 2:
        return None
    keys = [key for key in ORDER if any(_share(w, key) for w, _ in found)]
    shares = np.array([[_share(w, key) for key in keys] for w, _ in found])
    figure, canvas = _figure((11, 5.5))
    over, whole = figure.subplots(1, 2, width_ratios=(2, 1))
    steps, columns = _averaged(np.array([step for _, step in found], float), shares)
    over.stackplot(steps, 100 * columns.T, colors=[PART_COLOURS[key] for key in keys], linewidth=0)
    over.set(xlabel="step", ylabel="% of the step", ylim=(0, 100), xlim=(steps[0], steps[-1]))
    settled = shares[len(shares) // 5 :].mean(0)
    named = [i for i in range(len(keys)) if settled[i] >= _NAMED_FROM]
    left = 0.0
    for place, i in enumerate(named):
        bar = whole.barh(place, 100 * settled[i], left=100 * left, color=PART_COLOURS[keys[i]])
        whole.bar_label(bar, [f"{keys[i]} {100 * settled[i]:.1f}%"], padding=3, fontsize=8)
        left += settled[i]
    whole.set(xlim=(0, 140), xticks=range(0, 101, 25), xlabel="% of the step, mean", yticks=[])
    whole.invert_yaxis()
    figure.suptitle(f"{run.name}: where the time went")
    path = run / RunFile.WATERFALL
    canvas.print_png(str(path))
    return path


def draw_straggler_map(run: Path) -> Path | None:
    """Draws `stragglers.png` into the run's folder; none where no window of a job of several ranks is known."""
    rows = [
        s for row in lines_of(run / RunFile.METRICS) if isinstance(s := row.get("straggler"), dict) and "slower" in s
    ]
    lengths = {len(s["slower"]) for s in rows if isinstance(s["slower"], list)}
    if len(lengths) != 1 or max(lengths) < 2:
        return None
    figure, canvas = _figure((11, min(2 + 0.25 * max(lengths), 12)))
    axes = figure.subplots()
    drawn = draw_stragglers(axes, [s["step"] for s in rows], np.array([s["slower"] for s in rows], float))
    figure.colorbar(drawn, ax=axes, extend="both", label="% slower than its peers")
    figure.suptitle(f"{run.name}: stragglers")
    path = run / RunFile.STRAGGLERS
    canvas.print_png(str(path))
    return path


def _share(waterfall: dict[str, Any], key: str) -> float:
    value = waterfall.get(key)
    return max(float(value), 0.0) if isinstance(value, (int, float)) else 0.0


def _averaged(steps: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(columns,) and (columns, keys) means of neighbouring steps."""
    if len(steps) <= _COLUMNS:
        return steps, shares
    parts = np.array_split(np.arange(len(steps)), _COLUMNS)
    return np.array([steps[part].mean() for part in parts]), np.stack([shares[part].mean(0) for part in parts])


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    # Not pyplot, which keeps every figure and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    return figure, FigureCanvasAgg(figure)
