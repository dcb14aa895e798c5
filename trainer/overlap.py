"""Choosing by trial into how many chunks tokens are cut on their way to the experts, while the training runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from ..configs.schema import Config
from ..models.parallelize import set_overlap_chunks
from ..parallel.comm.collectives import all_reduce
from ..parallel.comm.mesh import Mesh
from .setup import Parts


class ChunkSearch:
    """Tries each number of chunks for some steps, then stays with the fastest.

    Every rank makes the same choice as long as every rank is told the same times.

    Args:
        degrees: numbers of chunks to try.
        warm_up: first steps with each that do not count.
        steps: steps with each that count, by their median.
    """

    def __init__(self, degrees: Sequence[int] = (1, 2, 4), *, warm_up: int = 1, steps: int = 3) -> None:
        if not degrees or steps < 1:
            raise ValueError(f"a search needs degrees and steps, got {list(degrees)} and {steps}")
        self.degrees, self.warm_up, self.steps = tuple(degrees), warm_up, steps
        self.chosen: int | None = degrees[0] if len(degrees) == 1 else None
        """The answer; none while the search goes on."""
        self._times: list[list[float]] = []

    def propose(self) -> int:
        """The number of chunks for the next step."""
        if self.chosen is not None:
            return self.chosen
        return self.degrees[self._at()]

    def observe(self, seconds: float) -> None:
        """How long the step with the proposed number took, on the slowest rank."""
        if self.chosen is not None:
            return
        at = self._at()
        if at == len(self._times):
            self._times.append([])
        self._times[at].append(seconds)
        if self._at() == len(self.degrees):
            typical = [median(times[self.warm_up :]) for times in self._times]
            self.chosen = self.degrees[typical.index(min(typical))]

    def _at(self) -> int:
        full = self.warm_up + self.steps
        return sum(len(times) == full for times in self._times)


class OverlapTuner:
    """Tries numbers of chunks in the first steps where the config says `auto`, and does nothing otherwise.

    Args:
        cfg: the job.
        parts: this rank's part of the model, and its device.
        mesh: whose ranks agree on the slowest one's times.
        search: one that was begun over another mesh, to go on with.
    """

    def __init__(self, cfg: Config, parts: Parts, mesh: Mesh, search: ChunkSearch | None = None) -> None:
        moe = cfg.model.moe
        wanted = moe.experts > 0 and moe.overlap_chunks == "auto" and moe.dispatcher == "all_to_all"
        self.search = (search or ChunkSearch()) if wanted else None
        self._model, self._device, self._mesh = parts.model, parts.device, mesh
        if self.search is not None and self.search.chosen is not None:
            set_overlap_chunks(self._model, self.search.chosen)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        search = self.search
        if search is None or search.chosen is not None:
            yield
            return
        set_overlap_chunks(self._model, search.propose())
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self._device)
        search.observe(all_reduce(seconds.reshape(1), self._mesh.axis("world"), "max").wait().item())
        if search.chosen is not None:
            set_overlap_chunks(self._model, search.chosen)

    def _synchronize(self) -> None:
        if self._mesh.device == "cuda":
            torch.cuda.synchronize()
