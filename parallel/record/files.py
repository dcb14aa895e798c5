"""Where a run's rings are: the index in the run's folder, and the copies that outlive the shared memory.

A run's folder may come from anywhere, so its index is not believed: a file is read, copied or removed only when it has
the name of a ring, lies where rings lie, is a plain file of this user, and says itself that it is that rank's ring.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...configs.strict_json import (
    JsonError,
    expect_int,
    expect_list,
    expect_object,
    expect_text,
    open_regular,
    read_json,
)
from ..comm.process_ids import ProcessId
from . import ring as record
from .reader import Header, RecordError, RecordRing, read, read_header, read_open
from .ring import FORMAT, HEADER_BYTES, NAMES_BYTES
from .slots import ENTRY_BYTES

_NAME = re.compile(r"pentad-.+-(\d+)\.ring")
_CHUNK = 1 << 20
_MAX_RANK = 1 << 24
_INDEX = "index.json"


def record_folder(run_dir: Path) -> Path:
    """Where a run's index and the copies of its rings are."""
    return run_dir / "record"


@dataclass(frozen=True)
class RingFile:
    """Where a rank's ring is: `file` on `host`; after `collect` also a copy in the run's record/. `number`: of the
    process that has the rank, where that is another one than at the job's start."""

    rank: int
    host: str
    file: str
    pid: int
    epoch: int = 0
    number: int | None = None

    @property
    def process(self) -> int:
        """The number in the job of the process that writes it."""
        return self.rank if self.number is None else self.number

    def collected(self, run_dir: Path) -> Path:
        """Path of the copy that `collect` makes."""
        return record_folder(run_dir) / f"rank-{self.rank:05d}.epoch-{self.epoch}.ring"


def write_index(run_dir: Path, rings: Iterable[RingFile], run: str = "") -> Path:
    """Write record/index.json, whole or not at all; one process calls it.

    run: tells this run from others in the same folder: of its own, rings of other epochs stay listed.
    """
    folder = record_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        known, before = _index(run_dir)
    except (OSError, RecordError):
        known, before = "", []
    listed = {(ring.epoch, ring.rank): ring for ring in (*(before if known == run else ()), *rings)}
    path = folder / _INDEX
    rows = [asdict(listed[key]) for key in sorted(listed)]
    partial = path.with_suffix(f".{os.getpid()}.partial")
    fd = _new_file(partial)
    with os.fdopen(fd, "w") as file:
        file.write(json.dumps({"format": FORMAT, "run": run, "rings": rows}, indent=1) + "\n")
    os.replace(partial, path)
    return path


def read_index(run_dir: Path) -> list[RingFile]:
    """Rings of a run by (epoch, rank). Raises OSError without an index, RecordError for an unreadable one."""
    return _index(run_dir)[1]


def _index(run_dir: Path) -> tuple[str, list[RingFile]]:
    path = record_folder(run_dir) / _INDEX
    try:
        known = expect_object(read_json(path), "the index", ("rings",))
        rings = [_row(row) for row in expect_list(known["rings"], "rings")]
        return expect_text(known.get("run", ""), "run"), rings
    except JsonError as error:
        raise RecordError(f"{path}: {error}") from error


def _row(value: object) -> RingFile:
    row = expect_object(value, "a ring", ("rank", "host", "file", "pid"))
    rank = expect_int(row["rank"], "rank", 0, _MAX_RANK)
    return RingFile(
        rank,
        expect_text(row["host"], "host"),
        expect_text(row["file"], "file"),
        expect_int(row["pid"], "pid"),
        expect_int(row.get("epoch", 0), "epoch"),
        None if row.get("number") is None else expect_int(row["number"], "number", 0, _MAX_RANK),
    )


def collect(run_dir: Path, rings: Iterable[RingFile], *, host: str | None = None, remove: bool = False) -> list[Path]:
    """Copy those of the rings that are on `host` (default: this one) into record/; what is gone is passed over.

    Called at exit or after a death, once per host; remove also deletes the originals. Only what was written of a
    ring is copied. Returns the copies.
    """
    copies = []
    for ring in rings:
        if ring.host != (host or socket.gethostname()):
            continue
        try:
            fd, header = open_ring(Path(ring.file), ring)
        except (OSError, RecordError):
            continue
        try:
            copies.append(_copy(fd, header, ring.collected(run_dir)))
        finally:
            os.close(fd)
        if remove:
            Path(ring.file).unlink(missing_ok=True)
    return copies


def read_ring(run_dir: Path, ring: RingFile) -> RecordRing:
    """A rank's ring: the original while it is there, otherwise the copy; under the rank that its process has in the
    ring's epoch. Errors as of `record_view.read`."""
    found = _read_ring(run_dir, ring)
    return replace(found, header=replace(found.header, rank=ring.rank))


def _read_ring(run_dir: Path, ring: RingFile) -> RecordRing:
    if ring.host == socket.gethostname():
        with suppress(OSError, RecordError):
            fd, _ = open_ring(Path(ring.file), ring)
            try:
                return read_open(fd, Path(ring.file))
            finally:
                os.close(fd)
    return read(ring.collected(run_dir))


def map_header(ring: RingFile) -> memoryview | None:
    """The header of a ring of this host, as its writer changes it; None where it is not on this host, or not there."""
    if ring.host != socket.gethostname():
        return None
    try:
        fd, _ = open_ring(Path(ring.file), ring)
    except (OSError, RecordError):
        return None
    try:
        return memoryview(mmap.mmap(fd, HEADER_BYTES, prot=mmap.PROT_READ))
    finally:
        os.close(fd)


def sweep() -> list[Path]:
    """Removes the rings of this user's dead processes from where rings lie; returns what was removed."""
    removed = []
    for folder in record.ring_folders():
        for path in sorted(folder.glob("pentad-*.ring")):
            with suppress(OSError, RecordError):
                fd, header = open_ring(path, None)
                try:
                    if ProcessId(header.pid).alive:
                        continue
                    # Processes of another container are not seen here, but their locks are.
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    removed.append(path)
                finally:
                    os.close(fd)
    return removed


def open_ring(path: Path, expected: RingFile | None, *, write: bool = False) -> tuple[int, Header]:
    """A file descriptor of a ring of this user; with `expected`, of that one; `write`: its words can be changed.

    Raises:
        RecordError: it is something else, or lies elsewhere.
        OSError: it cannot be opened.
    """
    match = _NAME.fullmatch(path.name)
    if match is None or path.parent not in record.ring_folders():
        raise RecordError(f"{path}: not where rings are, or not the name of one")
    try:
        fd = open_regular(path, write=write)
    except JsonError as error:
        raise RecordError(f"{path}: {error}") from None
    try:
        header = read_header(fd, path)
        if os.fstat(fd).st_uid != os.geteuid() or header.rank != int(match[1]):
            raise RecordError(f"{path}: of another user or rank")
        if expected is not None and (header.rank, header.pid) != (expected.process, expected.pid):
            raise RecordError(f"{path}: of rank {header.rank}, process {header.pid}, not of the one in the index")
    except BaseException:
        os.close(fd)
        raise
    return fd, header


def _copy(fd: int, header: Header, target: Path) -> Path:
    """Copies what was written of a ring: the rest of the file is zeros."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = HEADER_BYTES + NAMES_BYTES + min(header.next_ticket, header.capacity) * ENTRY_BYTES
    partial = target.with_suffix(f".{os.getpid()}.partial")
    at = 0
    with os.fdopen(_new_file(partial), "wb") as file:
        while at < left and (data := os.pread(fd, min(_CHUNK, left - at), at)):
            file.write(data)
            at += len(data)
    os.replace(partial, target)
    return target


def _new_file(path: Path) -> int:
    """Open for writing; never what somebody else has put there."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
