"""Choosing into how many chunks tokens are cut on their way to the experts, while the training runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..configs.schema import Config
from ..models.parallelize import set_overlap_chunks
from ..parallel.comm.collectives import all_reduce
from ..parallel.comm.mesh import Mesh
from ..parallel.expert.search import ChunkSearch
from .setup import Parts


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
