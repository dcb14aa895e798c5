"""The memory of a ring and its entries as they are written: one in each slot, and those that are not there yet."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path

from .vitals import EPOCH_WORD

ENTRY_BYTES = 128
NEXT_WORD = 64
"""The word of the header that has the next ticket."""

# version | enqueued start end | nbytes seq step | epoch micro_batch op kind axis group peer dtype stream flags |
# waited arrived cpu | unused
ENTRY = struct.Struct("=Qqqqqqqiiiiiiiiiiqqq8x")
_PAYLOAD = struct.Struct("=qqqqqqiiiiiiiiiiqqq")
START, END, EPOCH, OP, KIND, AXIS, PEER, FLAGS, WAITED, ARRIVED, CPU = 1, 2, 6, 8, 9, 10, 12, 15, 16, 17, 18
"""Where these are in an entry that is held: a list of what `_PAYLOAD` writes."""
_WORDS = ENTRY_BYTES // 8
_FLAGS_INT = 23
_START_WORD, _END_WORD, _WAITED_WORD = 2, 3, 12


class HeldEntries(dict[int, list[int]]):
    """Entries that are under way, or not in the ring yet, by their tickets, and what a recorder and its forks have in
    common."""

    most = full = 0
    """How many there may be that were not written yet, and with those that are under way."""
    waiting = -1
    """The ticket of what the main thread waits for."""
    ended: dict[int, list[int]] | None = None
    """Those that have ended and are in the ring, for a reader in this process; none: there is no reader. One more than
    the ring has room for says that some are missing."""


class Slots:
    """Those of one ring.

    No method locks. An entry that is in its slot is changed by aligned single stores, the end last: a killed writer
    leaves it open, never half closed.

    Args:
        ring: its memory.
        base: where the first slot begins, in bytes.
        capacity: slots; that of ticket t is t mod capacity.
    """

    def __init__(self, ring: memoryview, base: int, capacity: int) -> None:
        self._ring, self._words, self._ints = ring, ring.cast("q"), ring.cast("i")
        self._base, self._capacity = base // 8, capacity

    def write(self, held: HeldEntries) -> None:
        """Writes entries as they are now, and keeps those that are under way; without effect for those whose slot has
        another one by now."""
        words, ring, base, capacity = self._words, self._ring, self._base, self._capacity
        epoch, last, pack, ended = words[EPOCH_WORD], words[NEXT_WORD] - 1, _PAYLOAD.pack_into, held.ended
        # Their tickets at once: to make a pair of each may collect garbage, which is an entry itself.
        for ticket in list(held):
            entry = held.get(ticket)
            if entry is None:
                continue
            over, word = entry[END], base + ticket % capacity * _WORDS
            version = ticket // capacity * 2 + 2
            if words[word] <= version:
                if entry[EPOCH] < 0:
                    entry[EPOCH] = epoch
                # The version is odd while the payload changes: a reader that meets an odd version reads again.
                words[word] = version - 1
                pack(ring, word * 8 + 8, *entry)
                words[word] = version
            if over or words[word] > version:
                held.pop(ticket, None)
                if over and ended is not None and len(ended) <= capacity:
                    ended[ticket] = entry
            if ticket > last:
                last = ticket
        words[NEXT_WORD] = max(words[NEXT_WORD], last + 1)
        held.full = held.most + len(held) if held.most else 0

    def stamp(self, ticket: int, start: int | None, end: int, flags: int, waited: int) -> None:
        """Other times, of an entry that is in its slot."""
        words, word = self._words, self._base + ticket % self._capacity * _WORDS
        if words[word] != ticket // self._capacity * 2 + 2:
            return
        if flags:
            self._ints[word * 2 + _FLAGS_INT] |= flags
        if start is not None:
            words[word + _START_WORD] = start
        if waited:
            words[word + _WAITED_WORD] = waited
        words[word + _END_WORD] = end


def allocate(path: Path | None, size: int) -> mmap.mmap:
    """So many zeros, of a file at `path` or of this process alone. Raises OSError where there is no room."""
    if path is None:
        return mmap.mmap(-1, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Never truncate in place: a reader of the previous file would die of SIGBUS.
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        _reserve(fd, size)
        with suppress(OSError):
            # Held by the mapping until the process ends: whoever can lock the file for itself alone knows that its
            # writer is dead, and that no watcher means to keep it.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return mmap.mmap(fd, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    """Give the file real space: a sparse file on a full /dev/shm (64 MiB in a container) kills the writer by SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    zeros = bytes(1 << 20)
    for offset in range(0, size, len(zeros)):
        os.pwrite(fd, zeros[: min(len(zeros), size - offset)], offset)
