"""A rank's ring as somebody reads it who is neither the rank nor its watcher."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...parallel.comm.process_ids import ProcessId
from ...parallel.record.files import RingFile, open_ring
from ...parallel.record.reader import RecordError, RecordRing, read_open
from ...parallel.record.ring import CLOSED_WORD, HEADER_BYTES
from ...parallel.record.slots import NEXT_WORD
from ...parallel.record.stand import Condition, Stand, read_stand
from ...parallel.record.vitals import BEAT_WORD, FAILED_WORD, PROGRESS_WORD
from ...trainer.processes.failure import read_failure
from .watched import NEWEST, process_state

LOOK_S = 1.0
"""Between two looks at a run that is under way: who has not come on in between is waited for."""
_SILENT_S = 5.0


class RingView:
    """A ring that is read again and again, where it is or where it was copied to; it is never written to.

    Args:
        fd, path: of the file.
        host: of the rank.
        here: whether it is the rank's own ring, not a copy.
        newest: entries that are looked at.
    """

    def __init__(self, fd: int, path: Path, host: str, *, here: bool, newest: int = NEWEST) -> None:
        self._fd, self._path, self._host, self._newest = fd, path, host, newest
        self.ring: RecordRing = read_open(fd, path, newest=newest)
        self.alive = here and ProcessId(self.ring.header.pid).alive
        self.rank = self.ring.header.rank

    @staticmethod
    def open(folder: Path, ring: RingFile, *, newest: int = NEWEST) -> RingView | None:
        """None: it cannot be read."""
        if ring.host == socket.gethostname():
            with suppress(OSError, RecordError):
                fd, path = open_ring(Path(ring.file), ring)[0], Path(ring.file)
                return RingView(fd, path, ring.host, here=True, newest=newest)
        copy = ring.collected(folder)
        with suppress(OSError, RecordError):
            fd = os.open(copy, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            return RingView(fd, copy, ring.host, here=False, newest=newest)
        return None

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._fd)

    def _words(self) -> np.ndarray:
        return np.frombuffer(os.pread(self._fd, HEADER_BYTES, 0), "<i8")

    def mark(self) -> tuple[int, int]:
        """What changes with progress."""
        words = self._words()
        return int(words[NEXT_WORD]), int(words[PROGRESS_WORD])

    def now(self, before: tuple[int, int]) -> Stand:
        """Where a rank that lives stands; late, if nothing has changed since `before`."""
        ring, words, now = read_open(self._fd, self._path, newest=self._newest), self._words(), time.monotonic_ns()
        stand = read_stand(ring, words, now, self._host)
        last = int(ring.entries["enqueued"].max()) if len(ring.entries) else ring.header.mono_ns
        idle = (now - last) / 1e9
        silent = (now - int(words[BEAT_WORD])) / 1e9
        condition = Condition.RUNS
        if words[CLOSED_WORD] and not words[FAILED_WORD]:
            condition = Condition.DONE
        elif not ProcessId(ring.header.pid).alive:
            condition = Condition.DEAD
        elif silent > _SILENT_S:
            condition = Condition.STOPPED if process_state(ring.header.pid) in "Tt" else Condition.FROZEN
        late = self.mark() == before and idle > LOOK_S
        return Stand(**{**vars(stand), "condition": condition, "idle_s": idle, "late": late})

    def post_mortem(self, folder: Path) -> Stand:
        """Where a rank that has ended stood."""
        words = self._words()
        entries = self.ring.entries
        end = max(int(words[BEAT_WORD]), int(entries["enqueued"].max()) if len(entries) else 0)
        stand = read_stand(self.ring, words, end, self._host)
        condition, line = Condition.DONE if words[CLOSED_WORD] else Condition.DEAD, ""
        if words[FAILED_WORD]:
            failure = read_failure(folder, self.rank)
            lost = failure is not None and failure.lost
            condition, line = Condition.LOST if lost else Condition.FAILED, failure.lines[0] if failure else ""
        return Stand(**{**vars(stand), "condition": condition, "line": line})
