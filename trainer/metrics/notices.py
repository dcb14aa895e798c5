"""Lines for the person who watches a run."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

SAY_EVERY_S = 3.0


def warn(text: str) -> None:
    """Prints a line on the standard error stream; where that cannot be written either, nothing is left to say."""
    with contextlib.suppress(OSError):
        print(f"pentad: {' '.join(text.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def or_without(what: str) -> Iterator[None]:
    """Around the writing of something that a run can do without: where the disk does not take it, that is said."""
    try:
        yield
    except OSError as error:
        warn(f"{what} cannot be written ({error.strerror or error}); the run goes on without")


class ProgressLine:
    """A line on stderr every few seconds while something long goes on; nothing at all when it is quick.

    Any thread may advance it.
    """

    def __init__(self, label: str, total: float, enabled: bool = True) -> None:
        self._label, self._total, self._enabled = label, total, enabled
        self._done, self._lock = 0.0, threading.Lock()
        self._started = self._said = time.monotonic()

    def advance(self, size: float) -> None:
        """Count `size` more bytes of input."""
        with self._lock:
            self._done += size
            now = time.monotonic()
            if not self._enabled or now - self._said < SAY_EVERY_S:
                return
            self._said = now
        rate = self._done / (now - self._started)
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        left = max(self._total - self._done, 0.0) / rate
        line = f"{self._label}: {share:.0%} of {self._total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
