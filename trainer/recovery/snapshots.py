"""Copies of a rank's state in shared memory, which outlive its process: whoever takes its place on the node reads them.

A file has two halves, which take turns, so that the copy before is whole while one is made. It belongs to one process,
by its number: a process that was given up and wakes up writes into its own, of an epoch that is over.

    header │ seals of both halves │ index (JSON): which piece of which tensor is where │ point, state │ point, state
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...configs.strict_json import JsonError, expect_int, expect_list, expect_text, open_regular, parse_json
from ...parallel.global_tensor import GlobalTensor
from .point import RunPoint

_NAME = re.compile(r"snapshot\.(\d+)")
_MAGIC, _FORMAT = b"pentadsn", 1
_HEADER = struct.Struct("=8sIIQQ")
"""Magic, format, CRC-32 of the index, its bytes, bytes of a half's state."""
_SEAL = struct.Struct("=qqqqqqqq")
"""Number of the copy, 0 while one is made; step, epoch, slot; bytes and CRC-32 of the point, CRC-32 of the state,
and of these words."""
_SEALS = (64, 128)
_INDEX_AT = 4096
_PAGE = 4096
_POINT_BYTES = _PAGE
_ALIGNED = 64
_MAX_INDEX = 1 << 26


class NoSnapshot(ValueError):
    """A file is no whole snapshot, or not of what is wanted."""


def _memory(place: int, nbytes: int) -> memoryview:
    """Bytes of this process, which somebody else keeps."""
    return memoryview((ctypes.c_char * nbytes).from_address(place)).cast("B")


@dataclass(frozen=True)
class _PieceMap:
    """Where the pieces of a state lie in a half.

    Args:
        index: as JSON.
        first: byte of each piece, by name.
        size: bytes of the whole.
    """

    index: bytes
    first: Mapping[str, int]
    size: int

    @staticmethod
    def of(tensors: Mapping[str, GlobalTensor]) -> _PieceMap:
        places, rows, at, behind = dict[str, int](), [], 0, 0
        # By address: what lies side by side in memory does so in the file, and is copied at once.
        for name, piece in sorted(tensors.items(), key=lambda item: item[1].local.data_ptr()):
            local = piece.local
            if local.data_ptr() != behind:
                at = -(-at // _ALIGNED) * _ALIGNED
            places[name], behind = at, local.data_ptr() + local.nbytes
            rows.append([name, *_described(piece), at])
            at += local.nbytes
        return _PieceMap(json.dumps(rows).encode(), places, at)


def _described(piece: GlobalTensor) -> tuple[list[int], list[int], list[int], int, int, str]:
    place, first = piece.placement, piece.boxes[0].local_flat_start if piece.boxes else 0
    shapes = (list(place.global_shape), list(place.offsets), list(place.local_shape))
    return (*shapes, first, piece.local.numel(), str(piece.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class _Run:
    """Bytes that are copied at once, from an address to a place in the state."""

    source: int
    nbytes: int
    at: int


class SnapshotFile:
    """This process's copies of its state. The file takes the place of one from before with its first copy.

    Args:
        folder: of the job on this node, in memory.
        number: of this process in the job.
        tensors: this rank's pieces, on the host, whose memory is copied.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, folder: Path, number: int, tensors: Mapping[str, GlobalTensor]) -> None:
        self.path, self._new = folder / f"snapshot.{number}", folder / f"snapshot.{number}.new"
        places = _PieceMap.of(tensors)
        self.state_bytes = places.size
        self._index, self._tensors = places.index, dict(tensors)
        self._runs = _runs(tensors, places.first)
        self._halves = _halves(len(places.index), places.size)
        self._map = _new_map(self._new, _file_bytes(len(places.index), places.size))
        view = self._view = memoryview(self._map)
        view[_INDEX_AT : _INDEX_AT + len(places.index)] = places.index
        _HEADER.pack_into(view, 0, _MAGIC, _FORMAT, zlib.crc32(places.index), len(places.index), places.size)
        self._count = 0

    def follow(self, tensors: Mapping[str, GlobalTensor]) -> bool:
        """Copies from other memory from now on, if it holds the same pieces in the same order; whether it does."""
        places = _PieceMap.of(tensors)
        if places.index != self._index:
            return False
        self._tensors, self._runs = dict(tensors), _runs(tensors, places.first)
        return True

    def write(self, point: RunPoint, epoch: int, slot: int) -> None:
        """Makes a copy in the place of the older one."""
        half = self._count % 2
        self._count += 1
        view, seal, at = self._view, _SEALS[half], self._halves[half]
        _SEAL.pack_into(view, seal, *(0,) * 8)  # from here on it is not whole
        about = point.dump()
        view[at : at + len(about)] = about
        state = view[at + _POINT_BYTES : at + _POINT_BYTES + self.state_bytes]
        for run in self._runs:
            state[run.at : run.at + run.nbytes] = _memory(run.source, run.nbytes)
        words = (self._count, point.step, epoch, slot, len(about), zlib.crc32(about), zlib.crc32(state))
        _SEAL.pack_into(view, seal, *words, _check(words))
        if self._count == 1:
            os.replace(self._new, self.path)

    def close(self) -> None:
        """Copies nothing any more. What was copied stays."""
        if not self._count:
            self._new.unlink(missing_ok=True)
        self._tensors, self._runs = {}, []
        self._view.release()
        self._map.close()


def _check(words: tuple[int, ...]) -> int:
    return zlib.crc32(struct.pack("=7q", *words)) + 1  # never that of an empty seal


def _halves(index: int, size: int) -> tuple[int, int]:
    first = _paged(_INDEX_AT + index)
    return first, first + _POINT_BYTES + _paged(size)


def _file_bytes(index: int, size: int) -> int:
    return _halves(index, size)[1] + _POINT_BYTES + _paged(size)


def _paged(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _runs(tensors: Mapping[str, GlobalTensor], places: Mapping[str, int]) -> list[_Run]:
    """What is copied at once: pieces that lie side by side."""
    found: list[_Run] = []
    for name, at in places.items():
        source, nbytes = tensors[name].local.data_ptr(), tensors[name].local.nbytes
        last = found[-1] if found else None
        if last is not None and (last.source + last.nbytes, last.at + last.nbytes) == (source, at):
            found[-1] = _Run(last.source, last.nbytes + nbytes, last.at)
        elif nbytes:
            found.append(_Run(source, nbytes, at))
    return found


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


@dataclass(frozen=True)
class StoredPiece:
    """A piece of a global tensor in a snapshot: a run of a slice's elements, and where its bytes are."""

    name: str
    described: tuple[Any, ...]
    at: int


@dataclass(frozen=True)
class Snapshot:
    """A whole copy of the state of one slot after one step.

    Args:
        path: its file.
        epoch, slot: of the process that made it.
        point: how far the state is.
        pieces: by name.
        state: its bytes.
    """

    path: Path
    epoch: int
    slot: int
    point: RunPoint
    pieces: Mapping[str, StoredPiece]
    state: memoryview

    def _other(self, tensors: Mapping[str, GlobalTensor]) -> str:
        """In what it is of other pieces; empty: in nothing."""
        for name, piece in tensors.items():
            held = self.pieces.get(name)
            if held is None or held.described != _described(piece):
                return f"{self.path} does not hold this rank's piece of {name}"
        more = len(self.pieces) != len(tensors)
        return f"{self.path} holds {len(self.pieces)} pieces, this rank has {len(tensors)}" if more else ""

    def fill(self, tensors: Mapping[str, GlobalTensor]) -> None:
        """Copies the state into the memory of the same pieces.

        Raises:
            NoSnapshot: it holds others; nothing was copied.
        """
        wrong = self._other(tensors)
        if wrong:
            raise NoSnapshot(wrong)
        for name, piece in tensors.items():
            local, at = piece.local, self.pieces[name].at
            if local.nbytes:
                _memory(local.data_ptr(), local.nbytes)[:] = self.state[at : at + local.nbytes]


def snapshots_of(folder: Path, slot: int) -> dict[int, Snapshot]:
    """The whole copies that a node has of a slot's state, by step; of several of a step that of the latest epoch."""
    found: dict[int, Snapshot] = {}
    for path in sorted(folder.glob("snapshot.*")):
        if _NAME.fullmatch(path.name) is None:
            continue
        with suppress(OSError, NoSnapshot, JsonError):
            for each in read_snapshots(path):
                known = found.get(each.point.step)
                if each.slot == slot and (known is None or each.epoch > known.epoch):
                    found[each.point.step] = each
    return found


def read_snapshots(path: Path) -> list[Snapshot]:
    """The whole copies in a file.

    Raises:
        NoSnapshot, JsonError: it is no file of snapshots of this user.
        OSError: it cannot be read.
    """
    fd = open_regular(path)
    try:
        about = os.fstat(fd)
        if about.st_uid != os.geteuid() or about.st_size < _INDEX_AT:
            raise NoSnapshot(f"{path} is of another user, or too short")
        view = memoryview(mmap.mmap(fd, about.st_size, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
    magic, kind, crc, index_bytes, size = _HEADER.unpack_from(view, 0)
    if (magic, kind) != (_MAGIC, _FORMAT) or index_bytes > _MAX_INDEX or len(view) != _file_bytes(index_bytes, size):
        raise NoSnapshot(f"{path} is no file of snapshots")
    index = bytes(view[_INDEX_AT : _INDEX_AT + index_bytes])
    if zlib.crc32(index) != crc:
        raise NoSnapshot(f"the index of {path} is damaged")
    pieces = {piece.name: piece for piece in _pieces(index, size)}
    halves = zip(_SEALS, _halves(index_bytes, size), strict=True)
    found = [_whole(path, view, seal, at, size, pieces) for seal, at in halves]
    return [each for each in found if each is not None]


def _whole(
    path: Path, view: memoryview, seal: int, at: int, size: int, pieces: Mapping[str, StoredPiece]
) -> Snapshot | None:
    *words, check = _SEAL.unpack_from(view, seal)
    _, step, epoch, slot, about_bytes, about_crc, state_crc = words
    if check != _check(tuple(words)) or not 0 < about_bytes <= _POINT_BYTES:
        return None
    about = bytes(view[at : at + about_bytes])
    state = view[at + _POINT_BYTES : at + _POINT_BYTES + size]
    if zlib.crc32(about) != about_crc or zlib.crc32(state) != state_crc:
        return None
    point = RunPoint.load(about)
    return Snapshot(path, epoch, slot, point, pieces, state) if point.step == step else None


def _pieces(index: bytes, size: int) -> Iterator[StoredPiece]:
    for row in expect_list(parse_json(index), "the index"):
        if len(expect_list(row, "a piece")) != 8:
            raise JsonError(f"a piece is 8 values, not {len(row)}")
        name, dtype = expect_text(row[0], "a name"), expect_text(row[6], "a type")
        shapes = tuple([expect_int(n, "a size") for n in expect_list(each, "a shape")] for each in row[1:4])
        start, count, at = (expect_int(row[column], "a place") for column in (4, 5, 7))
        item = getattr(torch, dtype, None)
        if not isinstance(item, torch.dtype) or at + count * item.itemsize > size:
            raise JsonError(f"{name} is of no type, or lies outside")
        yield StoredPiece(name, (*shapes, start, count, dtype), at)
