"""Training in which the first rank learns where the others' time went, as in a job."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pentad.configs.schema import Config
from pentad.parallel.record import kinds, ring
from pentad.parallel.record.files import RingFile
from pentad.parallel.record.reader import RecordRing
from pentad.trainer.metrics.readings.protocol import RunFacts
from pentad.trainer.metrics.rows import RowExchange, StepRows
from pentad.trainer.session import Session, row_exchange
from tests.training import Run


def without_copies(record: RecordRing) -> np.ndarray:
    """The entries without those of copies that took long, as any may on a busy machine."""
    return record.entries[np.array([record.name(kind) != kinds.COPY for kind in record.entries["kind"]], bool)]


def ring_path(name: str, rank: int) -> Path:
    """Where rings lie."""
    return ring.ring_folders()[0] / ring.ring_name(name, rank)


def exchange(session: Session) -> RowExchange:
    """Of a session whose record is at `ring_path`."""
    mesh = session.mesh
    mine = RingFile(mesh.rank, socket.gethostname(), str(mesh.recorder.path), os.getpid())
    return row_exchange(session, mesh.gather_objects(mine))


@dataclass
class Watched:
    """A job that is stepped by a test, with the rows of its steps."""

    run: Run
    rows: RowExchange
    found: list[StepRows] = field(default_factory=list)
    """On rank 0, a step late."""
    lengths: list[float] = field(default_factory=list)

    def step(self) -> float:
        """Its length in seconds."""
        run, recorder = self.run, self.run.mesh.recorder
        step = recorder.step = len(self.lengths)
        begin = time.monotonic_ns()
        with recorder.span(recorder.intern(kinds.DATA)):
            batches = run.batches(step)
        result = run.stepper.run(step, *batches, run.cfg.optim.lr)
        float(result.loss)
        result.worst.wait()
        end = time.monotonic_ns()
        self.rows.step(step + 1, begin, end, 0.0)
        if run.mesh.is_first:
            self.found += self.rows.collect(step + 1)
        self.lengths.append((end - begin) / 1e9)
        return self.lengths[-1]

    def facts(self) -> RunFacts:
        """For readings."""
        run = self.run
        return RunFacts(
            cfg=run.cfg,
            devices=run.mesh.degrees.world,
            device="cpu",
            peak_tflops=1.0,
            ceiling_tflops=1.0,
            program=run.session.program,
            hosts=self.rows.hosts,
        )


@contextmanager
def watched(rank: int, cfg: Config, name: str) -> Generator[Watched]:
    """A job on this rank, set up."""
    path = ring_path(name, rank)
    run = Run(rank, cfg, record=path)
    rows = exchange(run.session)
    try:
        yield Watched(run, rows)
    finally:
        rows.close()
        run.close()
        path.unlink(missing_ok=True)
