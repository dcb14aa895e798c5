"""What a run has come to, in a few lines, from the files of its folder."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...configs import UserError
from ...configs.strict_json import JsonError, open_regular, parse_json
from ..checkpoint.names import checkpoints
from ..run_folder import RunFile
from .formats import duration


def summarize(run: Path) -> list[str]:
    """The run's loss, evaluation, speed and newest checkpoint, a line each.

    Raises:
        UserError: there is no run there, or its files are not what a run writes.
    """
    steps, events = lines_of(run / RunFile.METRICS), lines_of(run / RunFile.EVENTS)
    if not steps:
        raise UserError(f"{run} has no steps; give the folder of a run, runs/NAME")
    try:
        return _summary(run, steps, events)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"metrics.jsonl or events.jsonl of {run} is not what a run writes: {error!r}") from None


def _summary(run: Path, steps: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[str]:
    first, last = steps[0], steps[-1]
    seconds = duration(sum(s["step_time_s"] for s in steps))
    lines = [
        f"{run}: {len(steps):,} steps in {seconds}, {last['tokens']:,} tokens, loss {_loss(first)} → {_loss(last)}"
    ]
    if last["skipped"]:
        lines.append(f"{last['skipped']} steps skipped for a gradient that was not finite")
    evaluations = [e for e in events if e["event"] == "evaluation" and e["step"] <= last["step"]]
    if evaluations:
        newest, best = evaluations[-1], min(evaluations, key=lambda e: _finite(e["loss"]))
        lowest = "" if best is newest else f", lowest {best['loss']:.3f} after step {best['step']}"
        lines.append(f"held-out loss {_finite(newest['loss']):.3f} after step {newest['step']}{lowest}")
    settled = steps[len(steps) // 5 :]  # without warming up
    speed = f"{statistics.median(s['tokens_per_s'] for s in settled):,.0f} tokens/s"
    mfu = [s["mfu"] for s in settled if s["mfu"] is not None]
    lines.append(f"{speed}, MFU {statistics.median(mfu):.1%} (medians)" if mfu else f"{speed} (median)")
    return [*lines, _newest_checkpoint(run, events)]


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, as `objects_of` gives them."""
    return list(objects_of(file))


def objects_of(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, one by one; a line that a killed writer left half-written is passed over.

    Raises:
        UserError: it is no regular file, or cannot be read.
    """
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            for line in opened:
                with suppress(JsonError):
                    value = parse_json(line)
                    if isinstance(value, dict):
                        yield value
    except FileNotFoundError:
        return
    except (OSError, JsonError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def newest_of(file: Path, most: int = 1 << 16) -> list[dict[str, Any]]:
    """The objects of the last `most` bytes of a file of JSON lines; none where it cannot be read."""
    found = []
    with suppress(OSError, JsonError), os.fdopen(open_regular(file), "rb") as opened:
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - most))
        for line in opened.read(most).splitlines():
            with suppress(JsonError):
                if isinstance(value := parse_json(line), dict):
                    found.append(value)
    return found


def _loss(step: dict[str, Any]) -> str:
    return "not finite" if step["loss"] is None else f"{step['loss']:.3f}"


def _finite(loss: float | None) -> float:
    return float("inf") if loss is None else loss


def _newest_checkpoint(run: Path, events: list[dict[str, Any]]) -> str:
    elsewhere = [Path(e["path"]).parent for e in events if e["event"] == "checkpoint_saved" and "tier" not in e][-1:]
    found = [c for folder in (run / RunFile.CHECKPOINTS, *elsewhere) for c in checkpoints(folder)]
    if not found:
        return "no checkpoint"
    folder = found[0][1]
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"checkpoint {folder}: {size / 2**20:,.1f} MiB"
