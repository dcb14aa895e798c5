"""Threads for files, which do without where there is no memory for one more.

`threading.Thread.start` waits for the new thread to say that it runs; one that dies of a lack of memory before it can
say so is waited for without end, and so is everybody who waits for this rank.
"""

from __future__ import annotations

import _thread
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from ...parallel.comm.waiting import Abort

_POLL_S = 0.002
S = TypeVar("S")
T = TypeVar("T")


def map_threads(fn: Callable[[S], T], items: Iterable[S], threads: int) -> list[T]:
    """`fn` of each item, in their order, by several threads, of which the calling one is the first.

    Args:
        fn: what is computed; releases the interpreter lock most of the time.
        items: the arguments.
        threads: how many at most, this one included.

    Raises:
        Exception: the first one that `fn` raised; then no further item is begun.
    """
    waiting = deque(enumerate(items))
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    changed = threading.Condition()
    begun = 0

    def work() -> None:
        nonlocal begun
        while True:
            with changed:
                if not waiting or errors:
                    return
                number, item = waiting.popleft()
                begun += 1
            try:
                results[number] = fn(item)
            except BaseException as error:
                errors.append(error)
            finally:
                with changed:
                    begun -= 1
                    changed.notify_all()

    for _ in range(min(threads, len(waiting)) - 1):
        try:
            _thread.start_new_thread(work, ())
        except RuntimeError:  # no memory for a thread
            break
    work()
    with changed:
        changed.wait_for(lambda: not begun)
    if errors:
        raise errors[0]
    return [results[number] for number in sorted(results)]


class Beside:
    """A thread that runs jobs one after another beside the thread that gives them; it starts at once, and not later.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        # A daemon: a process that dies of an error does not stay for a write that other ranks cannot finish.
        threading.Thread(target=_serve, args=(self._jobs, self._idle), name=name, daemon=True).start()

    def run(self, job: Callable[[], object]) -> None:
        """Gives a job, which tells its failures itself; only when the one before has ended."""
        self._idle.clear()
        self._jobs.put(job)

    @property
    def idle(self) -> bool:
        """Whether there is no job."""
        return self._idle.is_set()

    def join(self, abort: Abort | None = None) -> None:
        """Returns when there is no job any more, or raises what `abort` does."""
        if abort is None:
            self._idle.wait()
        else:
            abort.until("the thread that writes", self._idle.is_set, _POLL_S)

    def close(self) -> None:
        """Ends the thread after its job."""
        self._jobs.put(None)


def _serve(jobs: queue.SimpleQueue[Callable[[], object] | None], idle: threading.Event) -> None:
    while (job := jobs.get()) is not None:
        try:
            # What the job could not tell is lost; the thread stays for the next one.
            with contextlib.suppress(BaseException):
                job()
        finally:
            del job
            idle.set()
