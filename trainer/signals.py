"""A clean stop on Ctrl-C and SIGTERM: finish the step, save, exit with 0."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Whether this rank was asked to stop. The ranks agree on the step inside the step's own collective."""

    def __init__(self) -> None:
        self.requested = False
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
