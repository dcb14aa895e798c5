"""The record: what this rank really did, in a fixed-size ring that outlives the process.

The ring is a file in node-local shared memory, mapped with MAP_SHARED: what was written is there for any other process
to read (`reader.read`), while this one runs and after it was killed. The newest `capacity` entries are kept. Format:
docs/record.md.

After a pass the caches hold nothing of this module, so what counts for an entry is how much code it touches: with
`hold` it is a list in a dictionary, and a few milliseconds later many are written at once.
"""

from __future__ import annotations

import copy
import itertools
import os
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import Protocol

from .slots import (
    ARRIVED,
    CPU,
    END,
    ENTRY_BYTES,
    FLAGS,
    START,
    WAITED,
    HeldEntries,
    Slots,
    allocate,
)
from .vitals import AT_STEP_WORD, AT_WORD, EPOCH_WORD, WAITS_WORD, Vitals

MAGIC = b"PENTADRC"
FORMAT = 2
HEADER_BYTES = 36864
NAMES_BYTES = 65536 - HEADER_BYTES

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
NAMES_USED_WORD, CLOSED_WORD = 65, 67
ROWS_WORD, ROWS, ROW_WORDS = 128, 32, 128
"""Where the rows of the newest steps are, how many of them, and the words of one: a version, then float64 numbers."""
_MOST_HELD = 256
"""Entries; then they are written by whoever makes one more."""
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
        self.step, self.micro_batch, self.op = 0, 0, -1
        self._map = allocate(path, HEADER_BYTES + NAMES_BYTES + entries * ENTRY_BYTES)
        view = memoryview(self._map)
        self._words = view.cast("q")
        self._slots = Slots(view, HEADER_BYTES + NAMES_BYTES, entries)
        # Reentrant: a signal handler or a finalizer may record while this very thread is inside enter().
        self._lock = threading.RLock()
        self._tickets, self._held = itertools.count(), HeldEntries()
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
        # What an abort has left open stays so, and is waited for no more.
        self._held.waiting = -1
        self.flush()
        self._held.clear()
        self._words[AT_WORD] = 0
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

    def hold(self) -> None:
        """From now on entries come into the ring by `flush`, which somebody must call every few milliseconds."""
        self._held.most = self._held.full = _MOST_HELD

    def release(self) -> None:
        """Ends `hold`."""
        self._held.most = 0
        self.flush()

    def flush(self) -> None:
        """Writes what is held, as it is now, and what the main thread waits for."""
        with self._lock:
            self._slots.write(self._held)
            self._words[WAITS_WORD] = self._held.waiting + 1

    def take_ended(self) -> dict[int, list[int]]:
        """Entries by their tickets (`slots.HeldEntries`) that have ended since this was called last. For one reader."""
        with self._lock:
            self.flush()
            ended, self._held.ended = self._held.ended, {}
        return ended or {}

    def put_back(self, ended: dict[int, list[int]]) -> None:
        """Entries that `take_ended` is to give once more."""
        with self._lock:
            self._held.ended = ended | (self._held.ended or {})

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
        """An open entry (enqueued = start = now, end = 0); returns its ticket, for `exit` and `stamp`."""
        # Without a lock: nobody else has the ticket.
        ticket, now, held = next(self._tickets), _now(), self._held
        # fmt: off
        held[ticket] = [now, now, 0, nbytes, seq, self.step, -1, self.micro_batch, self.op, kind, axis, group, peer,
                        dtype, stream, self._flags, 0, 0, 0]
        # fmt: on
        if len(held) > held.full:
            self.flush()
        return ticket

    def turn(self, ticket: int, kind: int, cpu: int = 0) -> int:
        """`exit` of an operation's entry (-1: there is none) and `enter` of the next one's, at the same moment; shows
        where the rank is."""
        now, held = _now(), self._held
        if ticket < 0:
            self._words[AT_STEP_WORD] = self.step
        elif (entry := held.get(ticket)) is not None:
            entry[CPU], entry[END] = cpu, now
        self._words[AT_WORD] = self.op + 1
        ticket = next(self._tickets)
        batch, op, flags = self.micro_batch, self.op, self._flags
        held[ticket] = [now, now, 0, 0, 0, self.step, -1, batch, op, kind, 0, 0, -1, 0, 0, flags, 0, 0, 0]
        if len(held) > held.full:
            self.flush()
        return ticket

    def leave(self, ticket: int, cpu: int = 0) -> None:
        """`exit` of the last operation's entry; from here on the rank is at none."""
        entry = self._held.get(ticket)
        if entry is not None:
            entry[CPU], entry[END] = cpu, _now()
        self.op = -1
        self._words[AT_WORD] = 0
        if not self._held.most:
            self.flush()

    def waits(self, ticket: int) -> None:
        """Marks that this rank has nothing else to do from now on than to wait for the entry's end; the first time
        counts."""
        held = self._held
        entry = held.get(ticket)
        if entry is None or entry[WAITED] or entry[END]:
            return
        entry[WAITED] = _now()
        if self._origin is None:
            held.waiting = ticket
            if entry[END]:  # by another thread, just now
                held.waiting = -1
        if not held.most:
            self.flush()

    def exit(self, ticket: int, flags: int = 0, *, arrived: int = 0, cpu: int = 0) -> None:
        """Close an entry now; without effect where it is closed, or the ring has come round and overwritten it.

        Args:
            ticket: of `enter`.
            flags: ABORTED, FAILED.
            arrived: when the last of those that take part had come to it (monotonic ns); 0: not known.
            cpu: what the thread computed in it (ns of its CPU time); 0: not known.
        """
        held = self._held
        entry = held.get(ticket)
        if entry is not None and not entry[END]:
            if flags:
                entry[FLAGS] |= flags
            entry[ARRIVED], entry[CPU] = arrived, cpu
            entry[END] = _now()  # last: whoever writes it down meanwhile comes to it again
        if held.waiting == ticket:
            held.waiting = -1
        if not held.most:
            self.flush()

    def stamp(self, ticket: int, start_ns: int | None, end_ns: int, flags: int = 0, *, waited: int = 0) -> None:
        """Set an entry's start and end afterwards (host clock), for times that come late, as CUDA events do; where they
        are given."""
        held = self._held
        for entries in (held, held.ended or {}):
            entry = entries.get(ticket)
            if entry is not None:
                entry[FLAGS] |= flags
                entry[START] = entry[START] if start_ns is None else start_ns
                entry[WAITED] = waited or entry[WAITED]
                entry[END] = end_ns
        self._slots.stamp(ticket, start_ns, end_ns, flags, waited)
        if not held.most:
            self.flush()

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
        self.release()
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
