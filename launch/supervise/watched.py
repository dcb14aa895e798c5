"""One rank as its node's watcher sees it: its process by the kernel, its signs of life by its ring's header."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...parallel.comm.process_ids import ProcessId
from ...parallel.record.files import open_ring
from ...parallel.record.patience import Patience
from ...parallel.record.reader import RecordRing, read_open
from ...parallel.record.ring import CLOSED_WORD, HEADER_BYTES
from ...parallel.record.slots import NEXT_WORD
from ...parallel.record.stand import Condition, Stand, read_stand
from ...parallel.record.vitals import (
    ABORT_WORD,
    BEAT_WORD,
    CHANGE_WORD,
    DATA_SINCE_WORD,
    DATA_THREAD_WORD,
    EPOCH_WORD,
    FAILED_WORD,
    LEFT_WORD,
    MAIN_THREAD_WORD,
    OUT_WORD,
    PHASE_WORD,
    PHASES,
    PROGRESS_WORD,
    READY_WORD,
    SINCE_WORD,
    STACKS_WORD,
    TOLD_WORD,
    WATCHED_WORD,
)
from .memory_groups import MemoryGroup

NEWEST = 16384
"""Entries of a ring that are looked at."""
_STALE_S = 1.0
"""Without a sign of life, of a rank that has made no progress for too long."""
_SURE_S = 0.2
"""Between the first look at which a rank was silent, and the one that counts."""
_IMPORTING = ("start", "load", "first step")
"""Phases in which code is loaded."""
_TICKS = os.sysconf("SC_CLK_TCK")


class WatchedRank:
    """A rank of this node.

    Args:
        path: its ring.
        patience: its limits.
        host: for words.

    Raises:
        RecordError, OSError: it is no ring of a process that lives.
    """

    def __init__(self, path: Path, patience: Patience, host: str) -> None:
        self.path, self.host, self._patience = path, host, patience
        fd, self.header = open_ring(path, None, write=True)
        self._fd = fd
        with contextlib.suppress(OSError):  # of file systems without locks
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # other jobs sweep away the rings of the dead
        self._words = memoryview(mmap.mmap(fd, HEADER_BYTES)).cast("q")
        self._words[WATCHED_WORD] = 1
        self.pidfd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self.pidfd = os.pidfd_open(self.header.pid)
        self._mark, self._changed = (-1, -1), time.monotonic()
        self._phase = PHASES[0]
        self._beat, self._heard = 0, time.monotonic()
        self._silent_since = 0.0
        self.code: int | None = None
        self.line = ""
        self.told_lost = self.by_user = False
        self.ended = self.missed_by_nobody = False
        self.slot = self.header.rank if self.header.rank < self.header.world else -1
        """In the job's mesh; -1: none yet."""
        self._next = (0, 0)
        """The epoch into whose mesh it is on its way, and since when, in ns; 0: it is in one."""
        self._cpu: dict[int, tuple[float, float]] = {}
        self.memory = MemoryGroup.of(self.header.pid)
        self._kills = self.memory.kills() if self.memory is not None else None

    @property
    def number(self) -> int:
        """Of the process in the job."""
        return self.header.rank

    def goes_to(self, slot: int, epoch: int, now: float) -> None:
        """From now on it is on its way into a slot of the mesh of `epoch`, and not late before it is there."""
        self.slot, self._next, self._changed = slot, (epoch, time.monotonic_ns()), now

    @property
    def on_its_way(self) -> bool:
        """Whether it is between two meshes."""
        epoch, since = self._next
        if epoch and self._words[EPOCH_WORD] >= epoch and self._words[SINCE_WORD] > since:
            self._next, self._changed = (0, 0), time.monotonic()
        return self._next[0] > 0

    def look(self, now: float) -> None:
        """Notes what has changed since the last look."""
        words = self._words
        mark, beat = (words[NEXT_WORD], words[PROGRESS_WORD]), words[BEAT_WORD]
        if mark != self._mark:
            self._patience.took(self._phase, now - self._changed)
            self._mark, self._changed = mark, now
            self._phase = PHASES[words[PHASE_WORD]] if 0 <= words[PHASE_WORD] < len(PHASES) else PHASES[0]
        if beat != self._beat:
            if self._beat:
                self._patience.took("alive", (beat - self._beat) / 1e9)
            self._beat, self._heard = beat, now

    def excuse(self, seconds: float) -> None:
        """Does not count a time in which this process was kept from looking: what kept it may have kept the rank."""
        self._changed += seconds
        self._heard += seconds

    def idle_s(self, now: float) -> float:
        """Seconds without progress."""
        return now - self._changed

    def late(self, now: float) -> bool:
        """Whether it has not come on for longer than its phase allows."""
        if self.on_its_way or self.ready:
            return False
        limit = self._patience.limit(self._phase)
        data_s = (time.monotonic_ns() - self._words[DATA_SINCE_WORD]) / 1e9 if self._words[DATA_SINCE_WORD] else 0.0
        # What prepares its data may have been at the same batch long before the rank came to need it.
        return self.idle_s(now) > limit or (self._phase == "data" and data_s > limit)

    def silent(self, now: float) -> bool:
        """Whether it has given no sign of life for too long, at two looks: this process may have been late itself."""
        limit = self._patience.limit("alive")
        if self._phase in _IMPORTING:  # which happens under Python's lock
            limit = max(limit, self._patience.limit("step"))
        beat_s = now - self._heard
        # On a machine with too little time for everything limits grow; who gets nowhere is judged all the same.
        if beat_s <= (min(limit, _STALE_S) if self.late(now) else limit):
            self._silent_since = 0.0
            return False
        self._silent_since = self._silent_since or now
        return now - self._silent_since > _SURE_S

    @property
    def unsure(self) -> bool:
        """Whether `silent` has to look once more."""
        return self._silent_since > 0

    @property
    def failed(self) -> bool:
        return self._words[FAILED_WORD] > 0

    @property
    def done(self) -> bool:
        """Whether it ends in good order, or is not needed for that."""
        return self.missed_by_nobody or (self._words[CLOSED_WORD] > 0 and not self.failed)

    @property
    def out(self) -> int:
        """When it reached its step loop again after an error, in ns; 0: it has not."""
        return self._words[OUT_WORD]

    @property
    def ready(self) -> bool:
        """Whether it waits for a mesh without having met a fault."""
        return self._words[READY_WORD] > 0

    def ask_to_leave(self, epoch: int) -> None:
        """Wants it to leave, after the step, every mesh before that of `epoch`."""
        self._words[CHANGE_WORD] = epoch

    def stays(self, now: float) -> bool:
        """Whether it was told to leave a mesh, and for as long as a hang takes has neither left it nor come to the next
        one."""
        epoch, since = self._next
        there = self.out or self._words[EPOCH_WORD] >= epoch
        return epoch > 0 and not there and now - since / 1e9 > self._patience.limit(self._phase)

    def alone_s(self, now: float) -> float:
        """Seconds for which it waits for a plan, having lost others of the mesh that it is in or goes to; 0: it does
        not."""
        out, (epoch, since) = self.out, self._next
        return 0.0 if not out or (epoch and out < since) else now - out / 1e9

    @property
    def left(self) -> bool:
        return self._words[LEFT_WORD] > 0

    def abort(self, epoch: int) -> None:
        """Tells it to leave whatever it waits for."""
        self._words[TOLD_WORD] = self._words[TOLD_WORD] or time.monotonic_ns()
        self._words[ABORT_WORD] = max(epoch, self.epoch) + 1

    @property
    def epoch(self) -> int:
        return self._words[EPOCH_WORD]

    # The process ------------------------------------------------------------------------------------------------

    def has_ended(self) -> bool:
        """Whether the process has; `code` is then its exit code, as far as the kernel tells."""
        if self.ended:
            return True
        if self.pidfd is not None:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            self.ended = bool(poll.poll(0))
        else:
            self.ended = not ProcessId(self.header.pid).alive
        if self.ended:
            self.code = _exit_code(self.header.pid)
        return self.ended

    def starved(self) -> str:
        """What a rank that the kernel killed for lack of memory had too little of; empty: it did not die of that."""
        if not self.ended or self.code not in (-signal.SIGKILL, None) or self.memory is None or self._kills is None:
            return ""
        return self.memory.limit_words() if (self.memory.kills() or 0) > self._kills else ""

    def state(self) -> str:
        """The kernel's letter for what the process does."""
        return process_state(self.header.pid)

    def stand(self, now: float, condition: Condition) -> Stand:
        """Where it stands; reads the ring."""
        ring = self._read()
        stand = read_stand(ring, self._words, time.monotonic_ns(), self.host)
        busy = {word: self._busy(self._words[word], now) for word in (MAIN_THREAD_WORD, DATA_THREAD_WORD)}
        values = {**vars(stand), "rank": self.slot, "condition": condition}
        values |= {"idle_s": self.idle_s(now), "late": self.late(now)}
        if condition in (Condition.STOPPED, Condition.FROZEN):
            values["idle_s"] = now - self._heard
        values |= {"busy": busy[MAIN_THREAD_WORD], "data_busy": busy[DATA_THREAD_WORD]}
        return Stand(**{**values, "code": self.code, "line": self.line, "starved": self.starved()})

    def sample(self, now: float) -> None:
        """Notes the CPU time of its threads, for `stand` a moment later."""
        for word in (MAIN_THREAD_WORD, DATA_THREAD_WORD):
            self._busy(self._words[word], now)

    def ask_stacks(self) -> bool:
        """Makes it write down its stacks; whether it can."""
        number = int(self._words[STACKS_WORD])
        if number and not self.ended:
            with contextlib.suppress(OSError):
                os.kill(self.header.pid, number)
                return True
        return False

    def _read(self) -> RecordRing:
        return read_open(self._fd, self.path, newest=NEWEST)

    def _busy(self, thread: int, now: float) -> float:
        """Share of a core that a thread took since it was first asked for."""
        fields = _stat(self.header.pid, thread) if thread else None
        if fields is None:
            return 0.0
        seconds = (int(fields[11]) + int(fields[12])) / _TICKS
        at, then = self._cpu.setdefault(thread, (now, seconds))
        return (seconds - then) / (now - at) if now - at > 0.05 else 0.0

    def close(self) -> None:
        os.close(self._fd)
        if self.pidfd is not None:
            os.close(self.pidfd)


def still_standing(stands: Mapping[int, Stand], ranks: Mapping[int, WatchedRank]) -> dict[int, Stand]:
    """The same, but of ranks that have come on since they were looked at none is late: on a busy machine that takes a
    while, and who was waited for may have come meanwhile.

    Args:
        stands: of ranks of this node.
        ranks: those of this node.
    """
    found, now = dict(stands), time.monotonic()
    for number, stand in stands.items():
        rank = ranks[number]
        rank.look(now)
        if stand.condition is Condition.RUNS and rank.idle_s(now) < stand.idle_s:
            found[number] = replace(stand, idle_s=rank.idle_s(now), late=False)
    return found


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does; X: it is gone."""
    fields = _stat(pid)
    return fields[0] if fields else "X"


def _stat(pid: int, thread: int | None = None) -> list[str] | None:
    """Fields of /proc/PID/stat behind the name."""
    path = f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat"
    try:
        return Path(path).read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _exit_code(pid: int) -> int | None:
    """Of a process that has ended and was not waited for yet; negative for a signal."""
    fields = _stat(pid)
    if not fields or fields[0] not in ("Z", "X") or len(fields) < 50:
        return None
    status = int(fields[49])
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
