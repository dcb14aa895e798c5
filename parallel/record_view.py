"""Reader of the record: from any process of the host, while the writer runs and after it was killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .record import (
    CLOSED_WORD,
    ENTRY_BYTES,
    EPOCH_WORD,
    FORMAT,
    HEADER,
    MAGIC,
    NAMES_USED_WORD,
    NEXT_WORD,
)

_TIMES = ["enqueued", "start", "end", "nbytes", "seq", "step"]
_CODES = ["epoch", "micro_batch", "op", "kind", "axis", "group", "peer", "dtype", "stream", "flags"]
_ON_FILE = np.dtype(
    {
        "names": ["version", *_TIMES, *_CODES],
        "formats": ["<u8"] + ["<i8"] * len(_TIMES) + ["<i4"] * len(_CODES),
        "offsets": [*range(0, 8 * 7, 8), *range(56, 56 + 4 * len(_CODES), 4)],
        "itemsize": ENTRY_BYTES,
    }
)
ENTRY_DTYPE = np.dtype([("ticket", "<i8")] + [(n, "<i8") for n in _TIMES] + [(n, "<i4") for n in _CODES])
"""Fields of `Ring.entries`; times in monotonic ns of the ring's host, end == 0 where the operation is under way."""
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
class Ring:
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


def read(path: Path) -> Ring:
    """Copy a ring. Raises OSError for a missing file, RecordError for one that is not a ring of this format."""
    with open(path, "rb", buffering=0) as file:
        first = file.read(HEADER.size)
        if len(first) < HEADER.size or not first.startswith(MAGIC):
            raise RecordError(f"{path}: not a record ring")
        fields = HEADER.unpack(first)
        _, version, header_bytes, names_bytes, entry_bytes, capacity, rank, world, pid, wall_ns, mono_ns = fields
        if version != FORMAT or entry_bytes != ENTRY_BYTES:
            raise RecordError(f"{path}: record format {version}, this version of Pentad reads {FORMAT}")
        fd = file.fileno()
        base = header_bytes + names_bytes
        entries, torn = _stable_entries(fd, base, capacity, path)
        # Names and counters last: every code and ticket seen above is then in them.
        words = np.frombuffer(os.pread(fd, header_bytes, 0), "<i8")
        names = _parse_names(os.pread(fd, int(words[NAMES_USED_WORD]), header_bytes))
    header = Header(
        rank=rank,
        world=world,
        pid=pid,
        epoch=int(words[EPOCH_WORD]),
        capacity=capacity,
        next_ticket=int(words[NEXT_WORD]),
        closed=bool(words[CLOSED_WORD]),
        wall_ns=wall_ns,
        mono_ns=mono_ns,
    )
    return Ring(header, names, entries, torn)


def _stable_entries(fd: int, base: int, capacity: int, path: Path) -> tuple[np.ndarray, int]:
    """Copy all slots; those that were being written, or differ between two copies, are read again, then given up.

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
        return (once == twice) & (once.view(_ON_FILE)["version"] % 2 == 0)

    first = copy(0, capacity).copy()
    kept = good(first, copy(0, capacity))
    for slot in np.flatnonzero(~kept):
        for _ in range(_RETRIES):
            once, twice = copy(int(slot), 1), copy(int(slot), 1)
            if good(once, twice)[0]:
                first[slot], kept[slot] = once[0], True
                break
    raw = first.view(_ON_FILE)
    slots = np.flatnonzero(kept & (raw["version"] != 0))
    return _by_ticket(raw[slots], slots, capacity), int((~kept).sum())


def _by_ticket(raw: np.ndarray, slots: np.ndarray, capacity: int) -> np.ndarray:
    entries = np.zeros(len(raw), ENTRY_DTYPE)
    for name in (*_TIMES, *_CODES):
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


@dataclass(frozen=True)
class RingFile:
    """Where a rank's ring is: `file` on `host`; after `collect` also a copy in the run's record/."""

    rank: int
    host: str
    file: str
    pid: int
    epoch: int = 0

    def collected(self, run_dir: Path) -> Path:
        """Path of the copy that `collect` makes."""
        return run_dir / "record" / f"rank-{self.rank:05d}.epoch-{self.epoch}.ring"


def write_index(run_dir: Path, rings: Iterable[RingFile]) -> Path:
    """Write record/index.json, whole or not at all; one process calls it. Other epochs' rings stay listed."""
    folder = run_dir / "record"
    folder.mkdir(parents=True, exist_ok=True)
    listed = {(ring.epoch, ring.rank): ring for ring in (*_indexed(run_dir), *rings)}
    path = folder / "index.json"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    rows = [asdict(listed[key]) for key in sorted(listed)]
    partial.write_text(json.dumps({"format": FORMAT, "rings": rows}, indent=1) + "\n")
    os.replace(partial, path)
    return path


def read_index(run_dir: Path) -> list[RingFile]:
    """Rings of a run by (epoch, rank). Raises OSError without an index, RecordError for an unreadable one."""
    path = run_dir / "record" / "index.json"
    try:
        return [RingFile(**row) for row in json.loads(path.read_text())["rings"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: {error}") from error


def _indexed(run_dir: Path) -> list[RingFile]:
    try:
        return read_index(run_dir)
    except (OSError, RecordError):
        return []


def collect(run_dir: Path, *, host: str | None = None, remove: bool = False) -> list[Path]:
    """Copy the rings of `host` (default: this one) into record/; rings that are gone are passed over.

    Called at exit or after a death, once per host; remove also deletes the originals. Returns the copies.
    """
    copies = []
    for ring in read_index(run_dir):
        source, target = Path(ring.file), ring.collected(run_dir)
        if ring.host != (host or socket.gethostname()) or not source.exists():
            continue
        partial = target.with_suffix(f".{os.getpid()}.partial")
        shutil.copyfile(source, partial)
        os.replace(partial, target)
        copies.append(target)
        if remove:
            source.unlink(missing_ok=True)
    return copies


def summary(ring: Ring, step: int) -> dict[str, float]:
    """Seconds per kind in a step, of finished entries (spans that nest or overlap are counted each)."""
    entries = ring.entries[(ring.entries["step"] == step) & (ring.entries["end"] > 0)]
    seconds = (entries["end"] - entries["start"]) / 1e9
    return {ring.name(int(k)): float(seconds[entries["kind"] == k].sum()) for k in np.unique(entries["kind"])}


def to_chrome(rings: Sequence[Ring]) -> dict[str, Any]:
    """Trace for chrome://tracing or Perfetto: a process per rank, a row per stream; wall-clock microseconds.

    Entries under way are drawn up to the newest time in their ring and carry `"open": true`.
    """
    events: list[dict[str, Any]] = []
    for ring in rings:
        rank = ring.header.rank
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        entries = ring.entries
        if not len(entries):
            continue
        for code in np.unique(entries["stream"]):
            args = {"name": ring.name(int(code)) or "main"}
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": int(code), "args": args})
        newest = int(max(entries["end"].max(), entries["start"].max()))
        events.extend(_chrome_event(ring, entry, newest) for entry in entries)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _chrome_event(ring: Ring, entry: np.void, newest: int) -> dict[str, Any]:
    end = int(entry["end"])
    args: dict[str, Any] = {n: int(entry[n]) for n in _NUMBERS}
    args.update({n: ring.name(int(entry[n])) for n in ("axis", "dtype")})
    if not end:
        args["open"] = True
    return {
        "ph": "X",
        "name": ring.name(int(entry["kind"])),
        "pid": ring.header.rank,
        "tid": int(entry["stream"]),
        "ts": ring.wall(int(entry["start"])) * 1e6,
        "dur": ((end or newest) - int(entry["start"])) / 1e3,
        "args": args,
    }
