"""Every rank's row of parts, brought to rank 0 without a collective: through shared memory and the job's store.

After a step each rank divides its own record and shows the row in its ring. The first rank of every other node sets its
node's rows in the store and waits for nothing; rank 0 reads those of its own node from their rings. A rank that shows
the row of a step has not passed the next step's norm, and rank 0 looks after that norm: so what it reads is a step old,
and there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...parallel.pipeline.program import Ops
from ...parallel.record.files import RingFile, map_header
from ...parallel.record.reader import read_row
from ...parallel.record.ring import HEADER_BYTES, ROW_WORDS, ROWS, Recorder
from ...parallel.record.waterfall import StepReader

_NUMBERS = ROW_WORDS - 1
_KEPT = ROWS
"""Steps of which rows are still waited for: as many as a ring shows."""


class Store(Protocol):
    """What is asked of the job's store."""

    def set(self, key: str, value: Any) -> object: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class StepRows:
    """The rows of all ranks of one step.

    Args:
        step: its number, from 1.
        rows: (ranks, numbers), `parallel/record/parts.py`.
    """

    step: int
    rows: np.ndarray


def open_schedule() -> int | None:
    """What the kernel counts of this very thread; none where it does not."""
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def queued_ns(schedule: int | None) -> int:
    """How long the thread could run and had no core, since it began; 0 where the kernel does not tell."""
    if schedule is None:
        return 0
    try:
        return int(os.pread(schedule, 64, 0).split()[1])
    except (OSError, IndexError, ValueError):
        return 0


class RowExchange:
    """One rank's end of the way.

    Args:
        recorder: of the rank.
        rank, world: its place in the mesh.
        ops: what it does in a step.
        pipelined: whether there are other stages.
        epoch: of the mesh.
        rings: where all ranks' rings are; none: only this rank's own row is known.
        store: of the job; none where all ranks are on one node.
    """

    def __init__(
        self,
        recorder: Recorder,
        rank: int,
        world: int,
        ops: Ops,
        *,
        pipelined: bool,
        epoch: int = 0,
        rings: Sequence[RingFile] = (),
        store: Store | None = None,
    ) -> None:
        self._recorder, self._rank, self._world, self._store = recorder, rank, world, store
        self._reader = StepReader(recorder, ops, pipelined=pipelined)
        self.ops = ops
        hosts: dict[str, list[int]] = {}
        for ring in rings:
            hosts.setdefault(ring.host, []).append(ring.rank)
        self._nodes = {ranks[0]: ranks for ranks in hosts.values()}
        self.hosts = {ring.rank: ring.host for ring in rings}
        """Where each rank is, as far as that is known."""
        mine = next((ranks for ranks in self._nodes.values() if rank in ranks), [rank])
        self._leads = mine[0] == rank and rank != 0
        wanted = mine if mine[0] == rank else []
        self._headers = {other: map_header(rings[other]) for other in wanted if other != rank}
        self._headers[rank] = recorder.memory[:HEADER_BYTES]
        self._prefix = f"rows-{epoch}"
        self._schedule = open_schedule()
        self._queued = queued_ns(self._schedule)
        self._own: StepRows | None = None
        self._far: dict[int, dict[int, np.ndarray]] = {}

    def step(self, step: int, begin: int, end: int, pairs: float) -> None:
        """Divides this rank's step, shows its row, and hands on those of its node.

        Args:
            step: its number, from 1.
            begin, end: when it began and ended on this rank (monotonic ns).
            pairs: attention pairs of its microbatches.
        """
        before, self._queued = self._queued, queued_ns(self._schedule)
        row = self._reader.read(step, begin, end, pairs=pairs, queued_s=(self._queued - before) / 1e9)
        self._own = None if row is None else StepRows(step, row[None])
        if row is not None and self._world > 1:
            self._recorder.publish(step, row.tobytes())
        if self._leads and self._store is not None and step > 1:
            rows = self._near(step - 1)
            body = np.array([step - 1, len(rows)], np.float64).tobytes()
            self._store.set(f"{self._prefix}/{self._rank}", body + b"".join(r.tobytes() for r in rows.values()))

    def _near(self, step: int) -> dict[int, np.ndarray]:
        """The rows of this node's ranks; of those that have none, NaN."""
        missing = np.full(_NUMBERS, np.nan)
        found = {rank: None if view is None else read_row(view, step) for rank, view in self._headers.items()}
        return {rank: missing if row is None else row for rank, row in sorted(found.items())}

    def collect(self, step: int) -> StepRows | None:
        """On rank 0, after a step: the rows of the newest earlier one of which all are there; none: there is none."""
        if self._world == 1:
            return self._own
        if step < 2:
            return None
        self._far.setdefault(step - 1, {})
        for old in [number for number in self._far if number <= step - _KEPT]:
            del self._far[old]
        for leader, ranks in self._nodes.items():
            if leader and self._store is not None:
                self._take(leader, ranks)
        for number in sorted(self._far, reverse=True):
            found = self._whole(number, self._near(number) | self._far[number])
            if found is not None:
                del self._far[number]
                return found
        return None

    def _take(self, leader: int, ranks: list[int]) -> None:
        """What the first rank of another node has set last."""
        assert self._store is not None
        key = f"{self._prefix}/{leader}"
        if not self._store.check([key]):
            return
        numbers = np.frombuffer(self._store.get(key), np.float64)
        if len(numbers) == 2 + _NUMBERS * len(ranks) and int(numbers[0]) in self._far:
            self._far[int(numbers[0])].update(zip(ranks, numbers[2:].reshape(len(ranks), _NUMBERS), strict=True))

    def close(self) -> None:
        """Lets go of what is open."""
        schedule, self._schedule = self._schedule, None
        if schedule is not None:
            os.close(schedule)

    def _whole(self, step: int, rows: Mapping[int, np.ndarray]) -> StepRows | None:
        if len(rows) != self._world:
            return None
        found = np.stack([rows[rank] for rank in range(self._world)])
        return StepRows(step, found) if not np.isnan(found[:, 0]).any() else None
