"""Micro-batches of one rank, prepared ahead by a thread that can neither hang nor fail unnoticed."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch

from ...configs.errors import Problem, UserError
from .dataset import MicroBatch, Split

_LOG = logging.getLogger(__name__)
_POLL_S = 0.1
_SAY_AFTER_S = 30.0


@dataclass(frozen=True)
class _Item:
    """One micro-batch, and the (valid labels, pairs) of the global batch that it belongs to."""

    batch: MicroBatch
    counts: tuple[int, int]


class Loader:
    """Iterates over steps ``start_step`` to ``steps - 1`` (steps counted from 0; ``steps`` is the run's total).

    Each step is the list of this rank's micro-batches: rank r of ``dp_size`` owns global micro-batches
    a * dp_size + r, a = 0, 1, … ``prefetch`` micro-batches are prepared ahead by a thread; 0 means none and no
    thread. An exception in the thread is raised by the ``next`` that would have returned its micro-batch. After each
    ``next``, ``wait_s`` is how long it waited (seconds) and ``counts`` the (valid labels, pairs) of the global batch.

    Raises UserError when ``global_batch`` is not a multiple of ``micro_batch * dp_size``.
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
    ) -> None:
        self._accumulate = _accumulation(global_batch, micro_batch, dp_size)
        self._split, self._global_batch = split, global_batch
        self._next, self._steps = start_step, steps
        self.wait_s = 0.0
        self.counts = (0, 0)
        pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        shape = (global_batch, micro_batch, dp_rank, dp_size)
        self._items = _items(split, range(start_step, steps), shape, pin)
        self._stop = threading.Event()
        self._queue: queue.Queue[_Item | BaseException] = queue.Queue(max(prefetch, 1))
        self._thread: threading.Thread | None = None
        if prefetch > 0:
            # The thread must not hold the loader, or a forgotten loader would keep its thread for ever.
            arguments = (self._items, self._queue, self._stop)
            self._thread = threading.Thread(target=_produce, args=arguments, name="pentad-data", daemon=True)
            self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._next >= self._steps:
            raise StopIteration
        started = time.monotonic()
        items = [self._take() for _ in range(self._accumulate)]
        self.wait_s = time.monotonic() - started
        self.counts = items[0].counts
        self._next += 1
        return [item.batch for item in items]

    def global_counts(self, step: int) -> tuple[int, int]:
        """(valid labels, pairs) of any step's global batch, the same on every rank."""
        return self._split.global_counts(step, global_batch=self._global_batch)

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call twice; afterwards ``next`` raises RuntimeError."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

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
                item = self._queue.get(timeout=_POLL_S)
                break
            except queue.Empty:
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


def heldout_batches(
    split: Split | None, *, steps: int, global_batch: int, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each evaluation step: the same sequences at every call and in every layout.

    Yields ``heldout_steps`` steps, so no sequence is evaluated twice unless one global batch is already larger than
    the split. Raises UserError when nothing is held out.
    """
    if split is None:
        raise UserError(Problem("data.holdout", "nothing is held out; set data.holdout above 0 or eval.every=0"))
    _accumulation(global_batch, micro_batch, dp_size)
    return _steps(split, heldout_steps(split, steps, global_batch), (global_batch, micro_batch, dp_rank, dp_size))


def heldout_steps(split: Split, steps: int, global_batch: int) -> int:
    """Evaluation steps that ``heldout_batches`` yields: at most ``steps``, and no more than the split fills."""
    fills = min(held // -(-count * global_batch // period) if count else 0 for held, count, period in _shares(split))
    return min(steps, max(1, fills))
