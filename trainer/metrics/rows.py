"""Every rank's row of parts, brought to rank 0 without a collective: through shared memory and the job's store.

After a step each rank divides its own record and shows the row in its ring; steps of less than 100 ms several at once,
all ranks in the same steps as far as their clocks agree. The first rank of every other node sets its node's rows in the
store and waits for nothing; rank 0 reads those of its own node from their rings. A rank that shows the row of a step
has not passed the next step's norm, and rank 0 looks after that norm: so what it reads is a step old, and there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...configs.schema import Config
from ...parallel.pipeline.program import Ops
from ...parallel.record.files import RingFile, map_header
from ...parallel.record.reader import read_rows
from ...parallel.record.ring import HEADER_BYTES, ROW_WORDS, ROWS, Recorder
from ...parallel.record.waterfall import StepReader, StepTimes

_NUMBERS = ROW_WORDS - 1
_KEPT = ROWS - 8
"""Steps of which rows are still waited for: as many as a ring shows when others are a few steps ahead."""
_AT_ONCE, _ALONE_NS, _LONG_NS = 8, 100_000_000, 250_000_000
"""Steps that are divided at once at most; how long one is that is divided alone, and several that are so anyway."""


def is_shown(cfg: Config, step: int, *, alone: bool) -> bool:
    """Whether all that is known is wanted at a step, or, as the ranks' rows come a step late, at the next one.

    Args:
        cfg: the job.
        step: from 1.
        alone: there is one rank.
    """
    every = (cfg.eval.every, cfg.checkpoint.every, cfg.log.every if cfg.log.every >= _AT_ONCE else 0)
    soon = range(step, step + 2 - alone)
    return cfg.train.steps in soon or any(n and at % n == 0 for n in every for at in soon)


class Store(Protocol):
    """What is asked of the job's store."""

    def set(self, key: str, value: Any) -> object: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class StepRows:
    """The rows of all ranks of one step, or of several as of one.

    Args:
        step: its number, from 1; of several the last one's.
        rows: (ranks, numbers), `parallel/record/parts.py`.
        steps: how many; more than one only of a job with one rank, which is compared with none.
    """

    step: int
    rows: np.ndarray
    steps: int = 1


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
        rings: where the rings of this rank's node are, on rank 0 all; none: only this rank's own row is known.
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
        self._headers = {ring.rank: map_header(ring) for ring in rings if ring.rank in wanted and ring.rank != rank}
        self._headers[rank] = recorder.memory[:HEADER_BYTES]
        self._prefix = f"rows-{epoch}"
        self._schedule = open_schedule()
        self._queued = queued_ns(self._schedule)
        self._times: list[StepTimes] = []
        self._sent: dict[int, int] = {}
        """Of steps that this rank has divided, how often it has set all rows of its node."""
        self._divided = self._ready = self._collected = -1
        """The last step that was divided, that which was before this one, and the last one that was collected."""
        self._own: tuple[StepRows, ...] = ()
        self._awaited: dict[int, dict[int, np.ndarray]] = {}
        """Of each step that is not collected yet the rows that have come from other nodes."""

    def step(self, step: int, begin: int, end: int, pairs: float, *, due: bool = True) -> None:
        """Divides this rank's step, shows its row, and hands on those of its node; or all that later, with steps that
        follow.

        Args:
            step: its number, from 1.
            begin, end: when it began and ended on this rank (monotonic ns).
            pairs: attention pairs of its microbatches.
            due: do not wait for others; the same on all ranks.
        """
        self._ready = self._divided
        if self._times and self._times[-1].end != begin:  # there was something else in between
            self._divide()
        self._times.append(StepTimes(step, begin, end, pairs))
        if self._world > 1 and self._rank == 0:
            self._awaited[step] = {}
        # By the step's number, so that all ranks have shown the same steps when rank 0 looks.
        long = end - begin >= _ALONE_NS or end - self._times[0].begin >= _LONG_NS
        if due or long or (step + 1) % _AT_ONCE == 0:
            self._divide()

    def _divide(self) -> None:
        before, self._queued = self._queued, queued_ns(self._schedule)
        times, self._times = self._times, []
        count, numbers, self._divided = len(times), [each.step for each in times], times[-1].step
        if self._world == 1:
            times = [StepTimes(times[-1].step, times[0].begin, times[-1].end, sum(each.pairs for each in times))]
        rows = self._reader.read(times, (self._queued - before) / 1e9)
        if rows is not None and self._world > 1:
            for number, row in zip(numbers, rows, strict=True):
                self._recorder.publish(number, row.tobytes())
        elif rows is not None:
            self._own = (*self._own, StepRows(numbers[-1], rows, count))
        if self._leads and self._store is not None:
            self._send(numbers)

    def _send(self, numbers: Sequence[int]) -> None:
        """Sets the rows of this node, each step's twice after all are there: rank 0 may miss one."""
        assert self._store is not None
        self._sent |= dict.fromkeys(numbers, 0)
        steps = list(self._sent)
        found = np.stack(list(self._near(steps).values()))
        head = np.array([len(steps), len(found), *steps], np.float64)
        self._store.set(f"{self._prefix}/{self._rank}", head.tobytes() + found.tobytes())
        whole: list[bool] = np.logical_not(np.isnan(found[:, :, 0]).any(0)).tolist()
        times = {step: self._sent[step] + there for step, there in zip(steps, whole, strict=True)}
        self._sent = {step: count for step, count in times.items() if count < 2 and step > steps[-1] - _KEPT}

    def _near(self, steps: Sequence[int]) -> dict[int, np.ndarray]:
        """The rows (steps, numbers) of this node's ranks; where one is not there, NaN."""
        missing = np.full((len(steps), _NUMBERS), np.nan)
        headers = sorted(self._headers.items())
        return {rank: missing if view is None else read_rows(view, steps) for rank, view in headers}

    def collect(self, step: int) -> tuple[StepRows, ...]:
        """On rank 0, after a step: the rows of earlier ones, in their order, that have not been given before."""
        if self._world == 1:
            own, self._own = self._own, ()
            return own
        if self._ready == self._collected:
            return ()
        self._collected = self._ready
        for old in [number for number in self._awaited if number <= step - _KEPT]:
            del self._awaited[old]
        numbers = sorted(number for number in self._awaited if number <= self._ready)
        if not numbers:
            return ()
        for leader, ranks in self._nodes.items():
            if leader and self._store is not None:
                self._take(leader, ranks)
        rows = np.full((self._world, len(numbers), _NUMBERS), np.nan)
        for rank, mine in self._near(numbers).items():
            rows[rank] = mine
        for place, number in enumerate(numbers):
            for rank, row in self._awaited[number].items():
                rows[rank, place] = row
        whole = np.flatnonzero(~np.isnan(rows[:, :, 0]).any(0)).tolist()
        for place in whole:
            del self._awaited[numbers[place]]
        return tuple(StepRows(numbers[place], rows[:, place]) for place in whole)

    def _take(self, leader: int, ranks: list[int]) -> None:
        """What the first rank of another node has set last."""
        assert self._store is not None
        key = f"{self._prefix}/{leader}"
        if not self._store.check([key]):
            return
        numbers = np.frombuffer(self._store.get(key), np.float64)
        count = int(numbers[0]) if len(numbers) else 0
        if len(numbers) != 2 + count + count * len(ranks) * _NUMBERS:
            return
        rows = numbers[2 + count :].reshape(len(ranks), count, _NUMBERS)
        for place, step in enumerate(numbers[2 : 2 + count].astype(int).tolist()):
            for rank, mine in zip(ranks, rows, strict=True):
                if step in self._awaited and not np.isnan(mine[place, 0]):
                    self._awaited[step][rank] = mine[place]

    def close(self) -> None:
        """Lets go of what is open."""
        schedule, self._schedule = self._schedule, None
        if schedule is not None:
            os.close(schedule)
