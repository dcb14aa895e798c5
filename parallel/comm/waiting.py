"""Waiting that can be interrupted.

gloo cannot abort an operation that is in flight, so a rank never blocks inside torch: it waits for an event which the
completion of the operation sets, and which `Abort.trigger` sets as well. Polling `is_completed` instead costs more
than a millisecond an operation on a busy machine. Waits on memory (`local.py`) poll and ask `Abort.check`.
"""

from __future__ import annotations

import _thread
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_TEND_EVERY_S, _LOOK_EVERY_S = 0.002, 0.05
"""How often a waiting thread polls what is tended, and how often it looks whether there is something to tend."""


class Aborted(RuntimeError):
    """The wait was given up because somebody triggered the abort flag of the mesh."""


class Overdue(TimeoutError):
    """A wait took longer than any may; whoever is waited for is the cause, not the one that waits."""


class Abort:
    """The abort flag of one mesh, and how long a wait may take."""

    def __init__(self, timeout_s: float = 600.0) -> None:
        self.timeout_s = timeout_s
        self.reason: str | None = None
        self._pending: set[threading.Event] = set()
        self._lock = threading.Lock()
        self._tended: dict[int, Callable[[], object]] = {}

    def trigger(self, reason: str) -> None:
        """Wakes every waiting thread with `Aborted`; later waits fail at once."""
        with self._lock:
            self.reason = reason
            for event in self._pending:
                event.set()

    def wait(self, done: threading.Event, what: str) -> None:
        """Waits for `done`.

        Raises:
            Aborted: the flag was triggered.
            Overdue: `timeout_s` seconds have passed; `what` names the operation.
        """
        with self._lock:
            # First: an abort sets the events as well.
            if self.reason is not None:
                raise Aborted(f"{what}: {self.reason}")
            if done.is_set():
                return
            self._pending.add(done)
        try:
            finished = self._wait_tending(done)
        finally:
            with self._lock:
                self._pending.discard(done)
        self.check(what, 0.0 if finished else self.timeout_s)

    def tend(self, key: int, poll: Callable[[], object]) -> None:
        """Calls `poll` again and again whenever a thread waits, until `leave(key)`: what is under way elsewhere goes on
        whatever this rank waits for."""
        self._tended[key] = poll

    def leave(self, key: int) -> None:
        """Ends `tend`."""
        self._tended.pop(key, None)

    def poll(self) -> None:
        """For waits that poll: what `tend` asks for."""
        for poll in list(self._tended.values()):
            poll()

    def _wait_tending(self, done: threading.Event) -> bool:
        begin = time.monotonic()
        while (left := begin + self.timeout_s - time.monotonic()) > 0:
            if done.wait(min(left, _TEND_EVERY_S if self._tended else _LOOK_EVERY_S)):
                return True
            self.poll()
        return done.is_set()

    def check(self, what: str, waited_s: float, whom: Callable[[], str] = str) -> None:
        """For waits that poll: raises as `wait` does, after `waited_s` seconds of waiting for `what` and `whom`."""
        if self.reason is not None:
            raise Aborted(f"{what}: {self.reason}")
        if waited_s >= self.timeout_s:
            named = whom()
            cause = f"for {named}" if named else "for other ranks, and pentad diagnose RUN says for which"
            raise Overdue(f"{what} waited {self.timeout_s:g} s (faults.timeout_s) {cause}")

    def beside(self, what: str, fn: Callable[[], T]) -> T:
        """What `fn` returns, called in a thread of its own: for calls that block in torch and cannot be woken.

        After an abort the thread is left to its fate.

        Raises:
            Aborted, Overdue: see `wait`.
            Exception: `fn`'s own.
        """
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(fn())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        try:
            _thread.start_new_thread(run, ())
        except RuntimeError:  # no memory for a thread
            return fn()
        self.wait(done, what)
        if errors:
            raise errors[0]
        return results[0]

    def until(self, what: str, test: Callable[[], bool], every_s: float = 0.0005) -> None:
        """Returns once `test` holds: for what can only be asked, as a CUDA event.

        Raises:
            Aborted, Overdue: see `wait`.
        """
        begin = time.monotonic()
        while not test():
            self.check(what, time.monotonic() - begin)
            self.poll()
            time.sleep(every_s)


class Blocking(Protocol):
    """A transfer of torch's in flight."""

    def wait(self) -> Any: ...


class Transfer:
    """A transfer whose end only a thread that blocks in it sees: gloo has no callback and no test for these.

    Args:
        work: the transfer.
        ended: called at its end, by the `Waiter`'s thread.
    """

    def __init__(self, work: Blocking, ended: Callable[[], None]) -> None:
        self._work, self._ended = work, ended
        self._done = threading.Event()
        self._error: Exception | None = None

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done.is_set()

    def watch(self) -> None:
        """Blocks until the end."""
        try:
            self._work.wait()
        except Exception as error:
            self._error = error
        self._ended()
        self._done.set()

    def wait(self, abort: Abort, what: str) -> None:
        """Returns at the end.

        Raises:
            Aborted, Overdue: see `Abort.wait`.
            RuntimeError: the peer is gone.
        """
        abort.wait(self._done, what)
        if self._error is not None:
            raise self._error


class Waiter:
    """A thread that waits for transfers one after the other: those of one kind with one peer end in order."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, transfer: Transfer) -> None:
        """Watches a transfer after those added before."""
        self._queue.put(transfer)

    def close(self) -> None:
        """Ends the thread, after an abort once torch gives up the transfer on which it waits."""
        self._queue.put(None)

    def _run(self) -> None:
        while (transfer := self._queue.get()) is not None:
            transfer.watch()
