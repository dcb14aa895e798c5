"""Microbatches of one rank, prepared ahead by a thread that can neither hang nor fail unnoticed."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from ...configs.errors import Problem, UserError
from ...configs.schema import TrainConfig
from ...parallel.comm.waiting import Abort
from ...parallel.record.vitals import Vitals
from .dataset import Microbatch, Split

_LOG = logging.getLogger(__name__)
_POLL_S = 0.1
_LOOK_S = 0.02
"""Between two looks whether waiting is still wanted."""
_SAY_AFTER_S = 30.0
_LOCATED = 256
"""Sequences whose places are looked up at once."""


@dataclass(frozen=True)
class _Item:
    """One microbatch, and the (valid labels, pairs) of the global batch that it belongs to."""

    batch: Microbatch
    counts: tuple[int, float]


class Loader:
    """Iterates over steps `start_step` to `steps - 1` (steps counted from 0; `steps` is the run's total).

    Each step is the list of this rank's microbatches: rank r of `dp_size` owns global microbatches
    a * dp_size + r, a = 0, 1, … `prefetch` microbatches are prepared ahead by a thread; 0 means none and no
    thread. An exception in the thread is raised by the `next` that would have returned its microbatch. After each
    `next`, `wait_s` is how long it waited (seconds) and `counts` the (valid labels, pairs) of the global batch.

    `abort` ends a wait for the thread; `vitals` are told what that is at.

    Raises UserError when `global_batch` is not a multiple of `micro_batch * dp_size`.
    """

    def __init__(
        self,
        split: Split,
        *,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        steps: int,
        prefetch: int = 4,
        pin_memory: bool | None = None,
        abort: Abort | None = None,
        vitals: Vitals | None = None,
    ) -> None:
        self._accumulate = _accumulation(global_batch, micro_batch, dp_size)
        self._split, self._global_batch = split, global_batch
        self._next, self._steps = start_step, steps
        self.wait_s = 0.0
        self.counts: tuple[int, float] = (0, 0)
        pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        shape = (global_batch, micro_batch, dp_rank, dp_size)
        self._abort, self._vitals = abort, vitals
        self._items = _items(split, range(start_step, steps), shape, pin, vitals)
        self._stop = threading.Event()
        self._queue: queue.Queue[_Item | BaseException] = queue.Queue(max(prefetch, 1))
        self._thread: threading.Thread | None = None
        if prefetch > 0:
            # The thread must not hold the loader, or a forgotten loader would keep its thread for ever.
            arguments = (self._items, self._queue, self._stop)
            self._thread = threading.Thread(target=_produce, args=arguments, name="pentad-data", daemon=True)
            self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> Iterator[list[Microbatch]]:
        return self

    def __next__(self) -> list[Microbatch]:
        if self._next >= self._steps:
            raise StopIteration
        started = time.monotonic()
        with nullcontext() if self._vitals is None else self._vitals.phase("data"):
            items = [self._take() for _ in range(self._accumulate)]
        self.wait_s = time.monotonic() - started
        self.counts = items[0].counts
        self._next += 1
        return [item.batch for item in items]

    def global_counts(self, step: int) -> tuple[int, float]:
        """(valid labels, pairs) of any step's global batch, the same on every rank."""
        return self._split.global_counts(step, global_batch=self._global_batch)

    def close(self) -> None:
        """Stop the thread and wait, 5 seconds at most, for it. Safe to call twice; then `next` raises RuntimeError.

        A thread stuck in a read of a dead file system is left behind; it is a daemon, so it cannot keep the process.
        """
        self._stop.set()
        if self._thread is not None and (self._abort is None or self._abort.reason is None):
            self._thread.join(timeout=5.0)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> _Item:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._thread is None:
            return next(self._items)
        said = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                if self._abort is not None:
                    self._abort.check("the next batch", 0.0)
                if self._stop.is_set():
                    raise RuntimeError("the loader was closed while waiting") from None
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError(f"the loader thread ended before step {self._next}") from None
                if time.monotonic() - said > _SAY_AFTER_S:
                    said = time.monotonic()
                    _LOG.warning("still waiting for the data of step %d", self._next)
        if isinstance(item, BaseException):
            self._stop.set()
            raise item
        return item


def dealt(split: Split, train: TrainConfig, dp_size: int, step: int, dp_rank: int) -> list[Microbatch]:
    """The microbatches of a step (from 0 on) that a loader gives to a rank."""
    shape = (train.global_batch, train.micro_batch, dp_rank, dp_size)
    return [item.batch for item in _items(split, range(step, step + 1), shape, torch.cuda.is_available(), None)]


def heldout_batches(
    split: Split | None, *, steps: int, global_batch: int, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[list[Microbatch]]:
    """This rank's microbatches of each evaluation step: the same sequences at every call and in every layout.

    Sources take their turns by weight; one that has given all that it holds out is passed over. Yields
    `heldout_steps` steps, so no sequence is evaluated twice unless one global batch is already larger than the
    split. Raises UserError when nothing is held out.
    """
    if split is None:
        raise UserError(Problem("data.holdout", "nothing is held out; set data.holdout above 0 or eval.every=0"))
    _accumulation(global_batch, micro_batch, dp_size)
    return _steps(split, heldout_steps(split, steps, global_batch), (global_batch, micro_batch, dp_rank, dp_size))


def heldout_steps(split: Split, steps: int, global_batch: int) -> int:
    """Evaluation steps that `heldout_batches` yields: at most `steps`, and no more than the split fills."""
    return min(steps, max(1, split.sequences // global_batch))


def _accumulation(global_batch: int, micro_batch: int, dp_size: int) -> int:
    share = micro_batch * dp_size
    if global_batch % share:
        message = (
            f"{global_batch} is not a multiple of train.micro_batch x data parallel ranks = {micro_batch} x {dp_size}"
        )
        raise UserError(Problem("train.global_batch", message))
    return global_batch // share


def _items(
    split: Split, steps: range, shape: tuple[int, int, int, int], pin: bool, vitals: Vitals | None
) -> Iterator[_Item]:
    global_batch, micro_batch, dp_rank, dp_size = shape
    own = np.arange(global_batch).reshape(-1, micro_batch)[dp_rank::dp_size].ravel()
    # Where sequences lie is found for many at once: one costs as much as a hundred.
    together = max(1, _LOCATED // len(own))
    for first in steps[::together]:
        block = range(first, min(first + together, steps.stop))
        samples = np.concatenate([step * global_batch + own for step in block])
        source, starts = split.locate(samples)
        for at in range(0, len(samples), micro_batch):
            if at % len(own) == 0:
                counts = split.global_counts(block[at // len(own)], global_batch=global_batch)
            if vitals is not None:
                vitals.makes_data(True)
            chosen = slice(at, at + micro_batch)
            batch = split.read(samples[chosen], source[chosen], starts[chosen])
            if vitals is not None:
                vitals.makes_data(False)
            yield _Item(batch.pin() if pin else batch, counts)


def _steps(split: Split, steps: int, shape: tuple[int, int, int, int]) -> Iterator[list[Microbatch]]:
    global_batch, micro_batch, dp_rank, dp_size = shape
    for step in range(steps):
        indices = range(dp_rank, global_batch // micro_batch, dp_size)
        yield [split.batch(step, index, global_batch=global_batch, micro_batch=micro_batch) for index in indices]


def _produce(items: Iterator[_Item], out: queue.Queue[_Item | BaseException], stop: threading.Event) -> None:
    """Body of the thread. Waits for room by polling, so that a full queue cannot keep it from seeing `stop`."""
    try:
        for item in items:
            if not _put(item, out, stop):
                return
    except BaseException as error:  # whatever it is, it belongs to the consumer
        _put(error, out, stop)


def _put(item: _Item | BaseException, out: queue.Queue[_Item | BaseException], stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            out.put(item, timeout=_POLL_S)
            return True
        except queue.Full:
            continue
    return False
