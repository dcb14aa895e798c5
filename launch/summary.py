"""What a run came to, in a few lines: ``python -m pentad.launch.summary RUN``. Verifies the newest checkpoint."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from ..configs import UserError
from ..trainer.checkpoint_files import checkpoints, verify


def summarize(run: Path) -> list[str]:
    """The run's loss, evaluation, speed and newest checkpoint, a line each.

    Raises:
        UserError: there is no run there, or its newest checkpoint is damaged.
    """
    steps, events = _read(run / "metrics.jsonl"), _read(run / "events.jsonl")
    if not steps:
        raise UserError(f"{run} has no steps; give the folder of a run, runs/NAME")
    first, last = steps[0], steps[-1]
    lines = [f"{run}: {len(steps)} steps, {last['tokens']:,} tokens, loss {first['loss']:.3f} → {last['loss']:.3f}"]
    evaluations = [e for e in events if e["event"] == "evaluation"]
    if evaluations:
        lines.append(f"held-out loss {evaluations[-1]['loss']:.3f} after step {evaluations[-1]['step']}")
    settled = steps[len(steps) // 5 :]  # without warming up
    speed = f"{statistics.median(s['tokens_per_s'] for s in settled):,.0f} tokens/s"
    mfu = [s["mfu"] for s in settled if s["mfu"] is not None]
    lines.append(f"{speed}, MFU {statistics.median(mfu):.1%} (medians)" if mfu else f"{speed} (median)")
    return lines + _newest_checkpoint(run, events)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _newest_checkpoint(run: Path, events: list[dict[str, Any]]) -> list[str]:
    elsewhere = [Path(e["path"]).parent for e in events if e["event"] == "checkpoint_saved"][-1:]
    found = [c for folder in (run / "checkpoints", *elsewhere) for c in checkpoints(folder)]
    if not found:
        return ["no checkpoint"]
    folder = found[0][1]
    problems = verify(folder)
    if problems:
        raise UserError(f"checkpoint {folder} is damaged: {problems[0]}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    return [f"checkpoint {folder}: {size / 2**20:.1f} MiB, verified"]


def main(argv: list[str]) -> int:
    """Prints the summary of the run that is named; 2 if there is none or its checkpoint is damaged."""
    if len(argv) != 1:
        print("error: usage: python -m pentad.launch.summary RUN", file=sys.stderr)
        return 2
    try:
        print("\n".join(summarize(Path(argv[0]))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
