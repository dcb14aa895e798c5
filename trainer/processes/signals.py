"""A clean stop on a signal: finish the step, save, exit with 0."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any

NOTICES = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What launchers and batch systems announce an end with (SLURM's --signal: often SIGUSR1)."""
STOPS = (signal.SIGINT, *NOTICES)


def heeded(numbers: Iterable[signal.Signals]) -> tuple[signal.Signals, ...]:
    """Those of the signals that mean this process: not SIGHUP where nohup has had it ignored."""
    return tuple(n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


class StopRequest:
    """Whether this rank was asked to stop. The ranks agree on the step inside the step's own collective."""

    def __init__(self) -> None:
        self.requested = False
        self.number = 0
        """Of the first signal that came."""
        self._previous: dict[int, Any] = {}

    def listen(self, numbers: Iterable[signal.Signals] = STOPS) -> StopRequest:
        """From now on these signals are requests."""
        for number in heeded(numbers):
            previous = signal.signal(number, self._on_signal)
            self._previous.setdefault(number, previous)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self.requested = True

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
