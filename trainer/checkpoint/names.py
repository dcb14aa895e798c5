"""Names of checkpoints on disk; what must be known of them without torch."""

from __future__ import annotations

import re
from pathlib import Path

_STEP = re.compile(r"step-(\d{8,15})")


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return directory / f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of the checkpoint that is published under `name`, if it is the name of one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and name == f"step-{int(match[1]):08d}" else None


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the published checkpoints, newest first; no word about their state."""
    if not directory.is_dir():
        return []
    named = ((step_of(path.name), path) for path in directory.iterdir())
    return sorted(((step, path) for step, path in named if step is not None and path.is_dir()), reverse=True)
