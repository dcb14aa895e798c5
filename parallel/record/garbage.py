"""Python's collections of garbage in the record: they hold all threads of a rank, whatever it was doing."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import kinds
from .ring import Recorder

_SHORTEST_NS = 200_000
"""Shorter ones come many times a step, and take less of it than an entry tells."""


@contextmanager
def recorded_collections(recorder: Recorder) -> Iterator[None]:
    """Inside this block every collection that takes 0.2 ms or longer becomes an entry, whichever thread it is in."""
    code, begun = recorder.intern(kinds.COLLECT), 0

    def watch(phase: str, _: dict[str, int]) -> None:
        nonlocal begun
        now = time.monotonic_ns()
        if phase == "start":
            begun = now
        elif begun and now - begun >= _SHORTEST_NS:
            recorder.stamp(recorder.enter(code), begun, now)

    gc.callbacks.append(watch)
    try:
        yield
    finally:
        gc.callbacks.remove(watch)
