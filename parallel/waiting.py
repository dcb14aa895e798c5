"""Waiting that can be interrupted.

gloo cannot abort an operation that is in flight, so a rank never blocks inside torch: it waits for an event which the
completion of the operation sets, and which `Abort.trigger` sets as well. Polling `is_completed` instead costs more
than a millisecond an operation on a busy machine.
"""

from __future__ import annotations

import threading


class Aborted(RuntimeError):
    """The wait was given up because somebody triggered the abort flag of the mesh."""


class Abort:
    """The abort flag of one mesh, and how long a wait may take."""

    def __init__(self, timeout_s: float = 600.0) -> None:
        self.timeout_s = timeout_s
        self.reason: str | None = None
        self._pending: set[threading.Event] = set()
        self._lock = threading.Lock()

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
            TimeoutError: `timeout_s` seconds have passed; `what` names the operation.
        """
        if done.is_set():
            return
        with self._lock:
            if self.reason is not None:
                raise Aborted(f"{what}: {self.reason}")
            self._pending.add(done)
        finished = done.wait(self.timeout_s)
        with self._lock:
            self._pending.discard(done)
        if self.reason is not None:
            raise Aborted(f"{what}: {self.reason}")
        if not finished:
            raise TimeoutError(f"{what} waited {self.timeout_s:g} s; set faults.timeout_s to wait longer")
