"""Reader of the record: from any process of the host, while the writer runs and after it was killed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...configs.strict_json import JsonError, open_regular
from .ring import (
    CLOSED_WORD,
    FORMAT,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    NAMES_BYTES,
    NAMES_USED_WORD,
    ROW_WORDS,
    ROWS,
    ROWS_WORD,
)
from .slots import ENTRY_BYTES, NEXT_WORD
from .vitals import EPOCH_WORD

_TIMES = ["enqueued", "start", "end", "nbytes", "seq", "step"]
_CODES = ["epoch", "micro_batch", "op", "kind", "axis", "group", "peer", "dtype", "stream", "flags"]
_MARKS = ["waited", "arrived", "cpu"]
ON_FILE = np.dtype(
    {
        "names": ["version", *_TIMES, *_CODES, *_MARKS],
        "formats": ["<u8"] + ["<i8"] * len(_TIMES) + ["<i4"] * len(_CODES) + ["<i8"] * len(_MARKS),
        "offsets": [*range(0, 8 * 7, 8), *range(56, 96, 4), *range(96, 120, 8)],
        "itemsize": ENTRY_BYTES,
    }
)
"""An entry as it lies in a ring."""
ENTRY_DTYPE = np.dtype(
    [("ticket", "<i8")] + [(n, "<i8") for n in _TIMES] + [(n, "<i4") for n in _CODES] + [(n, "<i8") for n in _MARKS]
)
"""Fields of `RecordRing.entries`; times in monotonic ns of its host, end == 0 while the operation is under way."""
_NUMBERS = ("step", "micro_batch", "op", "group", "peer", "nbytes", "seq", "flags")
_RETRIES = 64


class RecordError(ValueError):
    """The file is not a ring, or one of another format."""


@dataclass(frozen=True)
class Header:
    """Who wrote the ring. wall_ns and mono_ns were read together when it was made."""

    rank: int
    world: int
    pid: int
    epoch: int
    capacity: int
    next_ticket: int
    closed: bool
    wall_ns: int
    mono_ns: int


@dataclass(frozen=True)
class RecordRing:
    """A consistent copy of a ring: entries sorted by ticket, `torn` slots (half-written when it was read) left out."""

    header: Header
    names: tuple[str, ...]
    entries: np.ndarray
    torn: int

    def name(self, code: int) -> str:
        """Name of a kind, axis, dtype or stream code."""
        return self.names[code] if 0 <= code < len(self.names) else f"#{code}"

    def open(self) -> np.ndarray:
        """Entries that were entered and not left, oldest first."""
        return self.entries[self.entries["end"] == 0]

    def wall(self, ns: int) -> float:
        """Unix time in seconds of a time of an entry: the way to align rings of several hosts."""
        return (ns - self.header.mono_ns + self.header.wall_ns) / 1e9


def read_rows(header: memoryview, numbers: Sequence[int]) -> np.ndarray:
    """(steps, ROW_WORDS - 1) the rows of some steps as `Recorder.publish` showed them; NaN where one is not there, or
    not any more.

    Args:
        header: the first HEADER_BYTES of a ring, mapped.
        numbers: of the steps.
    """
    words = np.frombuffer(header, np.int64, ROWS * ROW_WORDS, 8 * ROWS_WORD).reshape(ROWS, ROW_WORDS)
    steps = np.asarray(numbers, np.int64)
    at, version = steps % ROWS, 2 * steps + 2
    there = words[at, 0] == version
    rows = words[at, 1:].view(np.float64)
    rows[~(there & (words[at, 0] == version))] = np.nan
    return rows


def read(path: Path) -> RecordRing:
    """Copy a ring. Raises OSError for a missing file, RecordError for one that is not a ring of this format."""
    try:
        fd = open_regular(path)
    except JsonError as error:
        raise RecordError(f"{path}: {error}") from None
    try:
        return read_open(fd, path)
    finally:
        os.close(fd)


def read_open(fd: int, path: Path, newest: int | None = None) -> RecordRing:
    """Copy the ring of an open file; `path` for the errors, which are those of `read`; `newest`: that many entries."""
    header = read_header(fd, path)
    base = HEADER_BYTES + NAMES_BYTES
    # A copy ends with its last used slot; a ring that is being written always has them all.
    there = (os.fstat(fd).st_size - base) // ENTRY_BYTES
    if there < min(header.next_ticket, header.capacity):
        raise RecordError(f"{path}: cut short")
    parts = [(0, min(there, header.capacity))]
    if newest is not None:
        # A ring that has come round: its newest entries lie before the slot that is next, and then at its end.
        used = min(there, header.capacity, header.next_ticket)
        count, end = min(used, newest), header.next_ticket % header.capacity or used
        parts = [(max(0, end - count), min(count, end))]
        if count > end:
            parts.insert(0, (header.capacity - (count - end), count - end))
    read_parts = [_stable_entries(fd, base, start, number, header.capacity, path) for start, number in parts]
    entries, torn = np.concatenate([part for part, _ in read_parts]), sum(torn for _, torn in read_parts)
    # Names and counters last: every code and ticket seen above is then in them.
    header = read_header(fd, path)
    used = np.frombuffer(os.pread(fd, 8, 8 * NAMES_USED_WORD), "<i8")[0]
    if not 0 <= used <= NAMES_BYTES:
        raise RecordError(f"{path}: its table of names has {used} bytes")
    return RecordRing(header, _parse_names(os.pread(fd, int(used), HEADER_BYTES)), entries, torn)


def read_header(fd: int, path: Path) -> Header:
    """Who wrote the ring of an open file; errors as of `read`."""
    data = os.pread(fd, HEADER_BYTES, 0)
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise RecordError(f"{path}: not a record ring")
    fields = HEADER.unpack_from(data)
    _, version, header_bytes, names_bytes, entry_bytes, capacity, rank, world, pid, wall_ns, mono_ns = fields
    if version != FORMAT or (header_bytes, names_bytes, entry_bytes) != (HEADER_BYTES, NAMES_BYTES, ENTRY_BYTES):
        raise RecordError(f"{path}: record format {version}, this version of Pentad reads {FORMAT}")
    words = np.frombuffer(data, "<i8")
    next_ticket = int(words[NEXT_WORD])
    if rank < 0 or world < 1 or not 0 < capacity < 1 << 48 or next_ticket < 0:
        raise RecordError(f"{path}: a header of rank {rank} of {world}, {capacity} entries, {next_ticket} written")
    return Header(
        rank=rank,
        world=world,
        pid=pid,
        epoch=int(words[EPOCH_WORD]),
        capacity=capacity,
        next_ticket=next_ticket,
        closed=bool(words[CLOSED_WORD]),
        wall_ns=wall_ns,
        mono_ns=mono_ns,
    )


def _stable_entries(
    fd: int, base: int, begin: int, slots_there: int, capacity: int, path: Path
) -> tuple[np.ndarray, int]:
    """Copy slots from `begin` on; those that change meanwhile, or differ between two copies, are read again, then left.

    The second copy makes the check hold on processors that reorder stores, where the version alone would not.
    """

    def copy(start: int, count: int) -> np.ndarray:
        parts, at, left = [], base + start * ENTRY_BYTES, count * ENTRY_BYTES
        while left:
            part = os.pread(fd, left, at)
            if not part:
                raise RecordError(f"{path}: cut short")
            parts.append(part)
            at, left = at + len(part), left - len(part)
        return np.frombuffer(b"".join(parts), f"V{ENTRY_BYTES}")

    def good(once: np.ndarray, twice: np.ndarray) -> np.ndarray:
        return (once == twice) & (once.view(ON_FILE)["version"] % 2 == 0)

    first = copy(begin, slots_there).copy()
    kept = good(first, copy(begin, slots_there))
    for slot in np.flatnonzero(~kept):
        for _ in range(_RETRIES):
            once, twice = copy(begin + int(slot), 1), copy(begin + int(slot), 1)
            if good(once, twice)[0]:
                first[slot], kept[slot] = once[0], True
                break
    raw = first.view(ON_FILE)
    slots = np.flatnonzero(kept & (raw["version"] != 0))
    return _by_ticket(raw[slots], begin + slots, capacity), int((~kept).sum())


def _by_ticket(raw: np.ndarray, slots: np.ndarray, capacity: int) -> np.ndarray:
    entries = np.zeros(len(raw), ENTRY_DTYPE)
    for name in (*_TIMES, *_CODES, *_MARKS):
        entries[name] = raw[name]
    generation = raw["version"].astype(np.int64) // 2 - 1
    entries["ticket"] = generation * capacity + slots
    return entries[np.argsort(entries["ticket"])]


def _parse_names(data: bytes) -> tuple[str, ...]:
    names, at = [], 0
    while at + 2 <= len(data):
        length = int.from_bytes(data[at : at + 2], "little")
        names.append(data[at + 2 : at + 2 + length].decode(errors="replace"))
        at += 2 + length
    return tuple(names)
