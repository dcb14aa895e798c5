"""Does the selection bias even out the experts' load? Two trainings on real text that differ in nothing else.

    python benchmarks/moe_balance.py --picture docs/pictures/moe_balance.svg

16 experts, two per token, in every layer, on the source text of Python's standard library, with sigmoid scores; once
with `router.selection_bias` and once without any balance. Both are ordinary runs of the trainer, side by side, one
process with one thread each; the curves are read from their metrics.jsonl. Fails where the bias leaves a load above the
limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

LIMIT = 1.5
"""Largest load of an expert over the mean one that counts as even."""
WINDOW = 20
"""Last steps whose mean is reported; a single batch of text is never even."""
COLOURS = {"selection bias": "#2f72b4", "no balance": "#c2543d"}


@dataclass(frozen=True)
class Curve:
    """One training, step by step."""

    load_mean: list[float]
    """Load of the busiest expert over the mean one, the mean over the layers."""
    load_worst: list[float]
    """The same of the worst layer."""
    loss: list[float]
    seconds: float
    """Of all steps."""


def job(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """The run's config, as a file would have it."""
    router = {"score": "sigmoid", "aux_loss": 0.0, "selection_bias": name == "selection bias", "bias_rate": 4e-3}
    return {
        "name": name.replace(" ", "-"),
        "runs_dir": str(folder),
        "model": {
            "family": "mixtral",
            "layers": 4,
            "hidden": 64,
            "heads": 2,
            "ffn": 128,
            "vocab": 320,
            "moe": {"experts": 16, "top_k": 2, "router": router},
        },
        "train": {
            "steps": steps,
            "global_batch": 64,
            "micro_batch": 64,
            "seq_len": 128,
            "dtype": "fp32",
            "device": "cpu",
        },
        "optim": {"lr": 2e-3, "schedule": {"name": "cosine", "warmup_steps": 20}},
        "data": {"name": "stdlib"},
        "checkpoint": {"final": False},
        "log": {"every": 20},
    }


def start(folder: Path, name: str, steps: int) -> subprocess.Popen[bytes]:
    """Starts the trainer in a process of its own, with one thread."""
    config = job(folder, name, steps)
    file = folder / f"{config['name']}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "pentad.trainer", str(file)], env=environment)


def curve(folder: Path, name: str) -> Curve:
    """What a run that has ended reported."""
    lines = (folder / name.replace(" ", "-") / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return Curve(
        load_mean=[row["moe"]["mean"]["load_max"] for row in rows],
        load_worst=[row["moe"]["worst"]["load_max"][0] for row in rows],
        loss=[row["loss"] for row in rows],
        seconds=sum(row["step_time_s"] for row in rows),
    )


def train(folder: Path, steps: int) -> dict[str, Curve]:
    """Both runs, side by side.

    Raises:
        RuntimeError: one of them failed.
    """
    running = {name: start(folder, name, steps) for name in COLOURS}
    for name, process in running.items():
        if process.wait():
            raise RuntimeError(f"the run with {name} ended with exit code {process.returncode}")
    return {name: curve(folder, name) for name in running}


def settled(values: list[float]) -> float:
    """The mean of the last steps."""
    return statistics.mean(values[-WINDOW:])


def below(values: list[float]) -> int | None:
    """The first step after which the mean of `WINDOW` steps never exceeds the limit again."""
    means = [statistics.mean(values[i - WINDOW : i]) for i in range(WINDOW, len(values) + 1)]
    over = [i for i, mean in enumerate(means) if mean >= LIMIT]
    first = over[-1] + 1 if over else 0
    return first + WINDOW if first < len(means) else None


def table(curves: dict[str, Curve]) -> str:
    """What the runs came to, in Markdown."""
    lines = [
        f"| | load max/mean, mean over layers | worst layer | below {LIMIT} from step | loss | s |",
        "|---|---|---|---|---|---|",
    ]
    for name, curve in curves.items():
        step = below(curve.load_worst)
        lines.append(
            f"| {name} | {settled(curve.load_mean):.2f} | {settled(curve.load_worst):.2f} | {step or 'never'} "
            f"| {settled(curve.loss):.3f} | {curve.seconds:.0f} |"
        )
    return "\n".join(lines) + f"\n\nLoads and losses: means of the last {WINDOW} steps of {len(curve.loss)}."


def draw(curves: dict[str, Curve], file: Path) -> None:
    """Load and loss over the steps, as SVG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    load, loss = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, curve in curves.items():
        steps, colour = range(1, len(curve.loss) + 1), COLOURS[name]
        load.plot(steps, curve.load_worst, color=colour, linewidth=1, alpha=0.45, label=f"{name}, worst layer")
        load.plot(steps, curve.load_mean, color=colour, linewidth=1.6, label=f"{name}, mean over layers")
        loss.plot(steps, curve.loss, color=colour, linewidth=1.2, label=name)
    load.axhline(LIMIT, color="#667085", linewidth=0.8, linestyle=(0, (4, 3)))
    load.set_ylim(bottom=1)
    _label(load, "busiest expert's load / mean load")
    _label(loss, "loss, nats")
    # Text as text, and the same names in the file every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pentad", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(str(file), metadata={"Date": None, "Creator": None})


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color="#1f2430")
    axes.set_xlabel("step", fontsize=9, color="#667085")
    axes.tick_params(labelsize=8, colors="#667085")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def main() -> int:
    """Trains twice, prints the table; 1 if the load did not even out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", type=Path, help="write the curves there, as SVG")
    parser.add_argument("--out", type=Path, help="write the curves there, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = train(Path(folder), arguments.steps)
    if arguments.out:
        arguments.out.write_text(json.dumps({name: vars(curve) for name, curve in curves.items()}) + "\n")
    if arguments.picture:
        draw(curves, arguments.picture)
    print(table(curves))
    return int(settled(curves["selection bias"].load_worst) >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
