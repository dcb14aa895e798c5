"""Files of JSON lines that a run appends to: a disk that is full for a while costs neither the run nor a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .notices import warn

_KEPT = 100_000
"""Most lines that wait for a disk that cannot be written; then the oldest are lost."""


class LineFile:
    """Appends JSON lines, each by one unbuffered write.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (lives as long as the sink)
        self._waiting: deque[bytes] = deque(maxlen=_KEPT)
        self._torn = False
        if self._file.seek(0, os.SEEK_END) and (self._file.seek(-1, os.SEEK_END), self._file.read(1))[1] != b"\n":
            self._torn = True  # a killed writer's half line stays a line of its own

    def write(self, value: Mapping[str, Any]) -> None:
        """Appends a line, after those that could not be written before."""
        before = len(self._waiting)
        self._waiting.append(json.dumps(finite(value), default=str).encode() + b"\n")
        try:
            self._append()
        except OSError as error:
            if not before:
                warn(f"{self._path} cannot be written ({error.strerror}); its lines are kept until it can")

    def _append(self) -> None:
        while self._waiting:
            line = b"\n" + self._waiting[0] if self._torn else self._waiting[0]
            count = self._file.write(line) or 0
            if count < len(line):
                # What is there of the line stays, as a line of its own.
                self._torn = line[count - 1 : count] != b"\n" if count else self._torn
                raise OSError(0, "the disk is full")
            self._torn = False
            self._waiting.popleft()

    def close(self) -> None:
        """Closes the file, after one more try at the lines that wait."""
        with contextlib.suppress(OSError):
            self._append()
        if self._waiting:
            warn(f"{self._path} lacks its last {len(self._waiting)} lines")
        self._file.close()


def finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None: what JSON can hold."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
