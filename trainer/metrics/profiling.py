"""Torch profiler traces of chosen steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Profiler:
    """Traces the steps in `steps` (1-based) into FOLDER/step-N-rank-R.json, to open in a trace viewer."""

    def __init__(self, steps: tuple[int, ...], folder: Path, rank: int) -> None:
        self._steps, self._folder, self._rank = frozenset(steps), folder, rank

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a whole step."""
        if step not in self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as trace:
            yield
        self._folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self._folder / f"step-{step}-rank-{self._rank}.json"))
