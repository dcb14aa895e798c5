"""The file of a rank's copies: how it is laid out, written and read, whatever it is that is copied.

A file has two halves, which take turns, so that the copy before is whole while one is made. It belongs to one process,
by its number: a process that was given up and wakes up writes into its own, of an epoch that is over.

    header │ seals of both halves │ index (JSON): which piece of which tensor is where │ point, state │ point, state
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...configs.strict_json import open_regular
from .point import RunPoint

_MAGIC, _FORMAT = b"pentadsn", 1
_HEADER = struct.Struct("=8sIIQQ")
"""Magic, format, CRC-32 of the index, its bytes, bytes of a half's state."""
_SEAL = struct.Struct("=8q")
"""Number of the copy, 0 while one is made; step, epoch, slot; bytes and CRC-32 of the point, CRC-32 of the state, and
of the words before this one."""
_SEALS = (64, 128)
_INDEX_AT = 4096
_PAGE = 4096
_POINT_BYTES = _PAGE
_MAX_INDEX = 1 << 26


class NoSnapshot(ValueError):
    """A file is no whole snapshot, or not of what is wanted."""


@dataclass(frozen=True)
class Seal:
    """What makes a half a copy: written last, and not there while one is made."""

    number: int
    step: int
    epoch: int
    slot: int
    point_bytes: int
    point_crc: int
    state_crc: int

    @property
    def words(self) -> tuple[int, ...]:
        """All of it, and a check."""
        found = tuple(vars(self).values())
        return (*found, zlib.crc32(struct.pack("=7q", *found)) + 1)  # never that of no seal


class CopyFile:
    """Copies that outlive this process. The file takes the place of one from before with its first copy.

    Args:
        path: in memory.
        index: what is in the state, as JSON.
        state_bytes: of the state.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, path: Path, index: bytes, state_bytes: int) -> None:
        self.path, self._new = path, path.with_name(f"{path.name}.new")
        self.index, self.state_bytes = index, state_bytes
        self._halves = _halves(len(index), state_bytes)
        self._map = _new_map(self._new, _file_bytes(len(index), state_bytes))
        view = self._view = memoryview(self._map)
        view[_INDEX_AT : _INDEX_AT + len(index)] = index
        _HEADER.pack_into(view, 0, _MAGIC, _FORMAT, zlib.crc32(index), len(index), state_bytes)
        self.published = False
        """Whether there is a copy, and the file of before is gone."""

    def body(self, half: int) -> memoryview:
        """The point, on a page of its own, and the state of a half."""
        at = self._halves[half]
        return self._view[at : at + _POINT_BYTES + self.state_bytes]

    def state(self, half: int) -> memoryview:
        """The state of a half."""
        return self.body(half)[_POINT_BYTES:]

    def open(self, half: int) -> None:
        """From now on the half is no copy."""
        _SEAL.pack_into(self._view, _SEALS[half], *(0,) * 8)

    def write(self, half: int, number: int, point: RunPoint, epoch: int, slot: int) -> Seal:
        """Ends a copy, of which the state is there."""
        about = point.dump()
        body = self.body(half)
        body[: len(about)] = about
        crcs = zlib.crc32(about), zlib.crc32(body[_POINT_BYTES:])
        return self.seal(half, Seal(number, point.step, epoch, slot, len(about), *crcs))

    def seal(self, half: int, seal: Seal) -> Seal:
        """The half is a copy now."""
        _SEAL.pack_into(self._view, _SEALS[half], *seal.words)
        if not self.published:
            os.replace(self._new, self.path)
            self.published = True
        return seal

    def close(self) -> None:
        """Writes nothing any more. What was copied stays."""
        if not self.published:
            self._new.unlink(missing_ok=True)
        with suppress(BufferError):  # a transfer that was given up may hold it a moment longer
            self._view.release()
            self._map.close()


@dataclass(frozen=True)
class WholeCopy:
    """A whole copy, read from its file.

    Args:
        path: its file.
        seal: its.
        point: how far the state is.
        index: what is in it.
        state: its bytes.
    """

    path: Path
    seal: Seal
    point: RunPoint
    index: bytes
    state: memoryview

    @cached_property
    def is_sound(self) -> bool:
        """Whether its bytes are those that were copied; looks at all of them, once."""
        return zlib.crc32(self.state) == self.seal.state_crc


def read_copies(path: Path) -> list[WholeCopy]:
    """The sealed copies in a file, whose states are still to be looked at (`WholeCopy.is_sound`).

    Raises:
        NoSnapshot, JsonError: it is no file of copies of this user.
        OSError: it cannot be read.
    """
    fd = open_regular(path)
    try:
        about = os.fstat(fd)
        if about.st_uid != os.geteuid() or about.st_size < _INDEX_AT:
            raise NoSnapshot(f"{path} is of another user, or too short")
        # Private, so that tensors may be made of it; nobody writes there.
        private = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        view = memoryview(mmap.mmap(fd, about.st_size, **private))
    finally:
        os.close(fd)
    magic, kind, crc, index_bytes, size = _HEADER.unpack_from(view, 0)
    if (magic, kind) != (_MAGIC, _FORMAT) or index_bytes > _MAX_INDEX or len(view) != _file_bytes(index_bytes, size):
        raise NoSnapshot(f"{path} is no file of copies")
    index = bytes(view[_INDEX_AT : _INDEX_AT + index_bytes])
    if zlib.crc32(index) != crc:
        raise NoSnapshot(f"the index of {path} is damaged")
    halves = zip(_SEALS, _halves(index_bytes, size), strict=True)
    found = [_whole(path, index, view, seal, at, size) for seal, at in halves]
    return [each for each in found if each is not None]


def _whole(path: Path, index: bytes, view: memoryview, at_seal: int, at: int, size: int) -> WholeCopy | None:
    words = _SEAL.unpack_from(view, at_seal)
    seal = Seal(*words[:-1])
    if words != seal.words or not 0 < seal.point_bytes <= _POINT_BYTES:
        return None
    about = bytes(view[at : at + seal.point_bytes])
    state = view[at + _POINT_BYTES : at + _POINT_BYTES + size]
    if zlib.crc32(about) != seal.point_crc:
        return None
    point = RunPoint.load(about)
    return WholeCopy(path, seal, point, index, state) if point.step == seal.step else None


def _halves(index: int, size: int) -> tuple[int, int]:
    first = _paged(_INDEX_AT + index)
    return first, first + _POINT_BYTES + _paged(size)


def _file_bytes(index: int, size: int) -> int:
    return _halves(index, size)[1] + _POINT_BYTES + _paged(size)


def _paged(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _new_map(path: Path, size: int) -> mmap.mmap:
    path.unlink(missing_ok=True)  # who reads the one before keeps it
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)  # a file without room behind it would kill its writer
        return mmap.mmap(fd, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
