"""The record: what this rank really did, in a fixed-size ring that outlives the process.

The ring is a file in node-local shared memory, mapped with MAP_SHARED: what was written is there for any other process
to read (`record_view.read`), while this one runs and after it was killed. Nothing is flushed, nothing is allocated per
entry, the newest `capacity` entries are kept. Format: docs/record.md.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import itertools
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from .vitals import EPOCH_WORD, WAITS_WORD, Vitals

MAGIC = b"PENTADRC"
FORMAT = 1
HEADER_BYTES = 4096
NAMES_BYTES = 65536 - HEADER_BYTES
ENTRY_BYTES = 128

ABORTED = 1
"""Flag: the wait was woken by an abort, the operation did not complete."""
FAILED = 2
"""Flag: an exception ended the operation."""
DEVICE_TIME = 4
"""Flag: start and end come from device events, not from the host's calls."""
BESIDE = 8
"""Flag: written by a `fork`, so for something beside the step's own thread."""

# magic, format, header bytes, name bytes, entry bytes, capacity, rank, world, pid, wall ns, monotonic ns
HEADER = struct.Struct("=8sIIIIQiiqqq")
# The words that change while the ring is written; each is one aligned 8-byte store.
NEXT_WORD, NAMES_USED_WORD, CLOSED_WORD = 64, 65, 67
ROWS_WORD, ROWS, ROW_WORDS = 128, 3, 128
"""Where the rows of the newest steps are, how many of them, and the words of one: a version, then float64 numbers."""
# version | enqueued start end | nbytes seq step | epoch micro_batch op kind axis group peer dtype stream flags |
# waited arrived cpu | unused
ENTRY = struct.Struct("=Qqqqqqqiiiiiiiiiiqqq8x")
_PAYLOAD = struct.Struct("=qqqqqqiiiiiiiiiiqqq")
_WORDS = ENTRY_BYTES // 8
_FLAGS_INT = 23
_END_WORD, _WAITED_WORD, _ARRIVED_WORD, _CPU_WORD = 3, 12, 13, 14
_NAME_LENGTH = struct.Struct("=H")

_now = time.monotonic_ns


class DeviceTimes(Protocol):
    """What tells when a device did what was enqueued (`device_clock.py`); its times are stamped later."""

    def begin(self, ticket: int, *, waited: bool = False) -> None:
        """The device's part of an entry begins here; with `waited` its stream's wait for it."""
        ...

    def end(self, ticket: int) -> None:
        """It ends here."""
        ...

    def __contains__(self, ticket: int) -> bool: ...


class Recorder:
    """Writer of one rank's ring.

    `step`, `micro_batch` and `op` (index of the program's operation, -1 outside it) are the context that the executor
    sets; they are stamped into every entry, whichever thread writes it. `kind`, `axis`, `dtype` and `stream` are
    codes of `intern`, `group` and `peer` numbers of the caller's. Times are `time.monotonic_ns()`, one clock for all
    processes of a host.
    """

    def __init__(self, path: Path | None, *, rank: int, world: int, entries: int = 65536, epoch: int = 0) -> None:
        """Create the ring of `entries` entries (128 bytes each).

        path: a node-local file, replaced where it exists; None: memory of this process only.
        Raises ValueError without room for one entry, OSError where the file cannot be made or its space reserved.
        """
        if entries < 1:
            raise ValueError(f"a ring has at least 1 entry, got {entries}")
        self.path = path
        self.rank, self.world, self.capacity = rank, world, entries
        self.step = 0
        self.micro_batch = 0
        self.op = -1
        self._base = HEADER_BYTES + NAMES_BYTES
        self._base_word, self._base_int = self._base // 8, self._base // 4
        self._map = _allocate(path, self._base + entries * ENTRY_BYTES)
        view = memoryview(self._map)
        self._words, self._ints = view.cast("q"), view.cast("i")
        # Reentrant: a signal handler or a finalizer may record while this very thread is inside enter().
        self._lock = threading.RLock()
        self._tickets = itertools.count()
        self._codes: dict[str, int] = {}
        self._origin: Recorder | None = None
        self.device: DeviceTimes | None = None
        """Of a rank whose work a device does while the host goes on; set before anything is forked."""
        self._flags = 0
        # fmt: off
        HEADER.pack_into(self._map, 0, MAGIC, FORMAT, HEADER_BYTES, NAMES_BYTES, ENTRY_BYTES, entries, rank, world,
                         os.getpid(), time.time_ns(), _now())
        # fmt: on
        self._words[EPOCH_WORD] = epoch
        self.vitals = Vitals(self._words)
        """This rank's signs of life."""
        self.intern("")

    @property
    def epoch(self) -> int:
        """Number of times that the mesh was rebuilt; stamped into every entry."""
        return self._words[EPOCH_WORD]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._words[EPOCH_WORD] = value

    def fork(self) -> Recorder:
        """A writer into the same ring with a context of its own, for what is done later than the step asked for it."""
        fork = copy.copy(self)
        fork._origin, fork._flags = self, BESIDE
        return fork

    @property
    def context(self) -> tuple[int, int, int]:
        """(step, micro_batch, op) that entries get now."""
        return self.step, self.micro_batch, self.op

    @context.setter
    def context(self, value: tuple[int, int, int]) -> None:
        self.step, self.micro_batch, self.op = value

    @property
    def origin(self) -> Recorder:
        """The recorder that this one was forked from, or itself."""
        return self._origin or self

    @property
    def memory(self) -> memoryview:
        """The bytes of the ring, for readers in this process."""
        return memoryview(self._map)

    @property
    def known(self) -> int:
        """How many names there are."""
        return len(self._codes)

    @property
    def names(self) -> tuple[str, ...]:
        """By their codes, those known so far."""
        return tuple(self._codes)

    def publish(self, number: int, row: bytes) -> None:
        """Shows a step's row, of at most ROW_WORDS - 1 float64 numbers, to the readers; of the last ROWS steps.

        Args:
            number: of the step.
            row: the numbers, as they lie in memory.

        Raises:
            ValueError: they are too many.
        """
        if len(row) > 8 * (ROW_WORDS - 1):
            raise ValueError(f"a row has at most {ROW_WORDS - 1} numbers, got {len(row) // 8}")
        word = ROWS_WORD + number % ROWS * ROW_WORDS
        with self._lock:
            self._words[word] = 2 * number + 1
            self._map[8 * word + 8 : 8 * word + 8 + len(row)] = row
            self._words[word] = 2 * number + 2

    def intern(self, name: str) -> int:
        """Code of a name, written into the file the first time; "" is 0, and so is any name once the table is full."""
        code = self._codes.get(name)
        if code is not None:
            return code
        with self._lock:
            if name in self._codes:
                return self._codes[name]
            text = name.encode()[:255]
            start = self._words[NAMES_USED_WORD]
            end = start + _NAME_LENGTH.size + len(text)
            if end > NAMES_BYTES:
                return 0
            at = HEADER_BYTES + start
            _NAME_LENGTH.pack_into(self._map, at, len(text))
            self._map[at + _NAME_LENGTH.size : HEADER_BYTES + end] = text
            self._words[NAMES_USED_WORD] = end
            self._codes[name] = len(self._codes)
            return self._codes[name]

    def enter(
        self,
        kind: int,
        axis: int = 0,
        group: int = 0,
        peer: int = -1,
        dtype: int = 0,
        nbytes: int = 0,
        seq: int = 0,
        stream: int = 0,
    ) -> int:
        """Write an open entry (enqueued = start = now, end = 0); returns its ticket, for `exit` and `stamp`."""
        with self._lock:
            ticket = next(self._tickets)
            generation, slot = divmod(ticket, self.capacity)
            word = self._base_word + slot * _WORDS
            words = self._words
            # The version is odd while the payload changes: a reader that meets an odd version reads again.
            words[word] = 2 * generation + 1
            now = _now()
            # fmt: off
            _PAYLOAD.pack_into(self._map, word * 8 + 8, now, now, 0, nbytes, seq, self.step, words[EPOCH_WORD],
                               self.micro_batch, self.op, kind, axis, group, peer, dtype, stream, self._flags, 0, 0, 0)
            # fmt: on
            words[word] = 2 * generation + 2
            words[NEXT_WORD] = ticket + 1
        return ticket

    def waits(self, ticket: int) -> None:
        """Marks that this rank has nothing else to do from now on than to wait for the entry's end; the first time
        counts."""
        generation, slot = divmod(ticket, self.capacity)
        word = self._base_word + slot * _WORDS
        with self._lock:
            words = self._words
            if words[word] == 2 * generation + 2 and not words[word + _WAITED_WORD] and not words[word + _END_WORD]:
                words[word + _WAITED_WORD] = _now()
                if self._origin is None:
                    self.vitals.waits(ticket)

    def exit(self, ticket: int, flags: int = 0, *, arrived: int = 0, cpu: int = 0) -> None:
        """Close an entry now; without effect where it is closed, or the ring has come round and overwritten it.

        Args:
            ticket: of `enter`.
            flags: ABORTED, FAILED.
            arrived: when the last of those that take part had come to it (monotonic ns); 0: not known.
            cpu: what the thread computed in it (ns of its CPU time); 0: not known.
        """
        generation, slot = divmod(ticket, self.capacity)
        word = self._base_word + slot * _WORDS
        with self._lock:
            words = self._words
            if words[WAITS_WORD] == ticket + 1:
                words[WAITS_WORD] = 0
            if words[word] != 2 * generation + 2:
                return
            if words[word + _END_WORD]:
                return
            # Aligned single stores, end last: a killed writer leaves the entry open, never half closed.
            if flags:
                self._ints[word * 2 + _FLAGS_INT] |= flags
            if arrived:
                words[word + _ARRIVED_WORD] = arrived
            if cpu:
                words[word + _CPU_WORD] = cpu
            words[word + _END_WORD] = _now()

    def stamp(self, ticket: int, start_ns: int | None, end_ns: int, flags: int = 0, *, waited: int = 0) -> None:
        """Set an entry's start and end afterwards (host clock), for times that come late, as CUDA events do; where they
        are given."""
        generation, slot = divmod(ticket, self.capacity)
        word = self._base_word + slot * _WORDS
        with self._lock:
            words = self._words
            if words[word] != 2 * generation + 2:
                return
            if flags:
                self._ints[word * 2 + _FLAGS_INT] |= flags
            if start_ns is not None:
                words[word + 2] = start_ns
            if waited:
                words[word + _WAITED_WORD] = waited
            words[word + _END_WORD] = end_ns

    def span(
        self,
        kind: int,
        axis: int = 0,
        group: int = 0,
        peer: int = -1,
        dtype: int = 0,
        nbytes: int = 0,
        seq: int = 0,
        stream: int = 0,
        *,
        on_device: bool = False,
    ) -> Span:
        """Context manager: `enter` at its start, `exit` at its end, with the FAILED flag where an exception ends it.

        on_device: what is inside is work for the device, and takes as long as it does there.
        """
        return Span(self, (kind, axis, group, peer, dtype, nbytes, seq, stream), self.device if on_device else None)

    def close(self) -> None:
        """Mark the ring as finished in good order. The file stays; entries of late threads still go into it."""
        self._words[CLOSED_WORD] = 1


class Span:
    """One entry around a block; `ticket` is set inside it. A class, because a generator costs twice as much."""

    __slots__ = ("_device", "_fields", "_recorder", "ticket")

    def __init__(self, recorder: Recorder, fields: tuple[int, ...], device: DeviceTimes | None) -> None:
        self._recorder, self._device = recorder, device
        self._fields = fields
        self.ticket = -1

    def __enter__(self) -> Span:
        self.ticket = self._recorder.enter(*self._fields)
        if self._device is not None:
            self._device.begin(self.ticket)
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if self._device is not None:
            self._device.end(self.ticket)
        self._recorder.exit(self.ticket, FAILED if kind is not None else 0)


def axis_members(axis: str, ranks: Sequence[int]) -> str:
    """The name by which a ring says who stands along an axis: `tp: 0-3:1`, runs of ranks from, to and by a stride."""
    runs, at = [], 0
    while at < len(ranks):
        stride = ranks[at + 1] - ranks[at] if at + 1 < len(ranks) else 1
        last = at
        while last + 1 < len(ranks) and ranks[last + 1] - ranks[last] == stride:
            last += 1
        runs.append(f"{ranks[at]}-{ranks[last]}:{stride}")
        at = last + 1
    return f"{axis}: {','.join(runs)}"


def ring_name(run_id: str, rank: int) -> str:
    """File name of a rank's ring; run_id must differ between runs and attempts that live on one host at a time."""
    return f"pentad-{run_id.replace('/', '_')}-{rank}.ring"


def ring_folders() -> tuple[Path, ...]:
    """Where rings are, the preferred folder first."""
    return Path("/dev/shm"), Path(tempfile.gettempdir())


def create(run_id: str, *, rank: int, world: int, entries: int = 65536, epoch: int = 0) -> Recorder:
    """Recorder in /dev/shm, or in the folder for temporary files where that is absent, read-only or full.

    Raises OSError where neither can hold the ring.
    """
    *folders, last = ring_folders()
    for folder in folders:
        try:
            return Recorder(folder / ring_name(run_id, rank), rank=rank, world=world, entries=entries, epoch=epoch)
        except OSError:
            continue
    return Recorder(last / ring_name(run_id, rank), rank=rank, world=world, entries=entries, epoch=epoch)


def _allocate(path: Path | None, size: int) -> mmap.mmap:
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
