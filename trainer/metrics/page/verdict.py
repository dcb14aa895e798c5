"""What ended a run, for the top of its page, and whom it alerted of: from its events, and the host from its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....parallel.record.files import read_index
from ....parallel.record.reader import RecordError
from .columns import by_step, known_number

_LINES, _TEXT, _RANKS = 40, 1000, 64
"""Of the details, of a line's characters, of ranks, that are shown."""


def verdict_of(run: Path, events: Sequence[Mapping[str, Any]], last_step: int | None) -> dict[str, Any] | None:
    """The watcher's verdict on the run's last start; None: it did not end by one.

    Args:
        run: its folder.
        events: of it.
        last_step: that was reported; where the verdict lies on the time axis.
    """
    for event in reversed(events):
        if event.get("event") in ("start", "end", "stopped"):
            return None
        if event.get("event") == "verdict":
            break
    else:
        return None
    told = event.get("ranks")
    ranks = [rank for rank in told if type(rank) is int][:_RANKS] if isinstance(told, list) else []
    hosts = _hosts(run)
    details = event.get("details")
    time = known_number(event.get("time"))
    return {
        "kind": _text(event.get("kind", "")),
        "line": _text(event.get("line", "")),
        "details": [_text(line) for line in details[:_LINES]] if isinstance(details, list) else [],
        "ranks": ranks,
        "hosts": sorted({hosts[rank] for rank in ranks if rank in hosts}),
        "time": round(time, 1) if math.isfinite(time) else None,
        "step": last_step,
    }


def alerts_of(events: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Step and words of each confirmed straggler."""
    found = by_step(event for event in events if event.get("event") == "straggler")
    return [[event["step"], _text(_straggler_words(event))] for event in found]


def _straggler_words(event: Mapping[str, Any]) -> str:
    link = f", its link with rank {event['peer']}" if event.get("peer") is not None else ""
    return f"straggler: rank {event.get('rank')} ({event.get('reason')}{link})"


def _hosts(run: Path) -> dict[int, str]:
    try:
        return {ring.rank: _text(ring.host) for ring in read_index(run)}
    except (OSError, RecordError):
        return {}


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
