"""`events.jsonl`: what happened to a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..line_file import LineFile


class EventLog:
    """`events.jsonl`: faults, restarts, checkpoints, evaluations; `{"time": Unix seconds, "event": …, …}` a line."""

    def __init__(self, path: Path) -> None:
        """Appends; several processes of a node may hold the same file."""
        self._file = LineFile(path)

    def log(self, event: str, **fields: Any) -> None:
        """Append one event."""
        self._file.write({"time": time.time(), "event": event, **fields})

    def close(self) -> None:
        """Close the file."""
        self._file.close()
