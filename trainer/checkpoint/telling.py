"""What is told of checkpoints: events, lines for the person who watches, messages to trackers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..metrics.notices import warn

_ALERTING = ("checkpoint_failed", "checkpoint_skipped")


class Telling:
    """Tells on rank 0, from whichever thread.

    Args:
        on_event: called with each event.
        first: whether this is rank 0; the others tell nothing.
        tier: which checkpoints they are, where not those that all ranks see.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None], *, first: bool, tier: str | None = None) -> None:
        self._on_event, self._first = on_event, first
        self._always = {} if tier is None else {"tier": tier}
        self._unheard: deque[dict[str, Any]] = deque()

    def event(self, event: str, **about: Any) -> None:
        """Notes an event."""
        if not self._first:
            return
        if event in _ALERTING:
            self._unheard.append({"event": event, **about, **self._always})
        try:
            self._on_event({"event": event, **about, **self._always})
        except Exception as error:  # the disk that has no room for a checkpoint has none for the event either
            self.say(f"{event} could not be noted ({error})")

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._first:
            warn(text)

    def unheard(self) -> list[dict[str, Any]]:
        """Events of saves that failed or were passed over since it was asked last."""
        return [self._unheard.popleft() for _ in range(len(self._unheard))]
