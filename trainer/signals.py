"""A clean stop on Ctrl-C and SIGTERM: finish the step, save, exit with 0."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Whether this rank was asked to stop. The ranks agree on the step inside the step's own collective."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def listen(self) -> StopRequest:
        """From now on Ctrl-C and SIGTERM are requests."""
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
