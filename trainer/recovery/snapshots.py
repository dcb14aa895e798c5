"""Copies of a rank's state, as pieces of global tensors: whoever takes its place reads them."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...configs.strict_json import JsonError, expect_int, expect_list, expect_text, parse_json
from ...parallel.global_tensor import GlobalTensor, Placement
from .copy_file import CopyFile, NoSnapshot, Seal, WholeCopy, read_copies
from .pieces import TensorPiece
from .point import RunPoint

COPY_NAME = re.compile(r"snapshot\.(\d+)(\.partner)?(\.new)?")
"""Of a file with copies, or one that is being made: the number of its process; `partner`: of another rank's state."""
_ALIGNED = 64


def _memory(place: int, nbytes: int) -> memoryview:
    """Bytes of this process, which somebody else keeps."""
    return memoryview((ctypes.c_char * nbytes).from_address(place)).cast("B")


@dataclass(frozen=True)
class _PieceMap:
    """Where the pieces of a state lie.

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
        first: dict[int, str] = {}
        for name, piece in tensors.items():
            storage = piece.local.untyped_storage().data_ptr()
            first[storage] = min(name, first.get(storage, name))
        # What lies side by side in memory does so in the file, and is copied at once; wherever the memory is.
        order = {
            name: (first[piece.local.untyped_storage().data_ptr()], piece.local.data_ptr(), name)
            for name, piece in tensors.items()
        }
        for name in sorted(tensors, key=order.__getitem__):
            piece, local = tensors[name], tensors[name].local
            if local.data_ptr() != behind:
                at = -(-at // _ALIGNED) * _ALIGNED
            places[name], behind = at, local.data_ptr() + local.nbytes
            rows.append([name, *_described(piece), at])
            at += local.nbytes
        return _PieceMap(json.dumps(rows).encode(), places, at)


def _described(piece: GlobalTensor) -> tuple[list[int], list[int], list[int], int, int, str]:
    place = piece.placement
    shapes = (list(place.global_shape), list(place.offsets), list(place.local_shape))
    return (*shapes, piece.start, piece.local.numel(), str(piece.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class _Run:
    """Bytes that are copied at once, from an address to a place in the state."""

    source: int
    nbytes: int
    at: int


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


class SnapshotFile:
    """This process's copies of its state.

    Args:
        folder: of the job on this node, in memory.
        number: of this process in the job.
        tensors: this rank's pieces, on the host, whose memory is copied.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, folder: Path, number: int, tensors: Mapping[str, GlobalTensor]) -> None:
        places = _PieceMap.of(tensors)
        self.file = CopyFile(folder / f"snapshot.{number}", places.index, places.size)
        self._tensors, self._runs = dict(tensors), _runs(tensors, places.first)
        self._count = 0
        self._steps = [-1, -1]
        """Of the copies in the halves."""

    def follow(self, tensors: Mapping[str, GlobalTensor]) -> bool:
        """Copies from other memory from now on, if it holds the same pieces in the same order; whether it does."""
        places = _PieceMap.of(tensors)
        if places.index != self.file.index:
            return False
        self._tensors, self._runs = dict(tensors), _runs(tensors, places.first)
        return True

    def write(self, point: RunPoint, epoch: int, slot: int) -> tuple[int, Seal]:
        """Makes a copy in the place of the older one; the half that it is in."""
        half = self._count % 2
        self._count, self._steps[half] = self._count + 1, point.step
        self.file.open(half)
        state = self.file.state(half)
        for run in self._runs:
            state[run.at : run.at + run.nbytes] = _memory(run.source, run.nbytes)
        return half, self.file.write(half, self._count, point, epoch, slot)

    def go_back(self, step: int) -> None:
        """The ranks go on from a step: copies of later ones are none any more, for those will be done again, perhaps in
        another order of adding."""
        for half, copied in enumerate(self._steps):
            if copied > step:
                self.file.open(half)

    def close(self) -> None:
        """Copies nothing any more. What was copied stays."""
        self._tensors, self._runs = {}, []
        self.file.close()


@dataclass(frozen=True)
class StoredPiece:
    """A piece of a global tensor, and the first of its bytes in a state."""

    name: str
    piece: TensorPiece
    at: int


@dataclass(frozen=True)
class Snapshot:
    """A whole copy of the state of one slot after one step.

    Args:
        copy: as it was read.
        number: of the process that has kept it.
        partner: of another process's state.
    """

    copy: WholeCopy
    number: int
    partner: bool

    @property
    def point(self) -> RunPoint:
        """How far the state is."""
        return self.copy.point

    @cached_property
    def tensors(self) -> dict[str, GlobalTensor]:
        """Its pieces, by name, in the memory of the copy: nobody may write there.

        Raises:
            JsonError: the index is none.
        """
        found = dict[str, GlobalTensor]()
        for stored in stored_pieces(self.copy.index, len(self.copy.state)):
            piece = stored.piece
            memory = self.copy.state[stored.at : stored.at + piece.count * piece.dtype.itemsize]
            data = torch.frombuffer(memory, dtype=piece.dtype) if piece.count else torch.empty(0, dtype=piece.dtype)
            found[stored.name] = GlobalTensor(piece.placement, piece.start, piece.start + piece.count, data)
        return found


def snapshots_on_node(folder: Path, passed_over: Collection[int] = ()) -> list[Snapshot]:
    """The sealed copies that a node has, those of later meshes first; their states are still to be looked at
    (`WholeCopy.is_sound`).

    Args:
        folder: of the job on the node.
        passed_over: numbers of processes whose files are not looked at.
    """
    found: list[Snapshot] = []
    for path in sorted(folder.glob("snapshot.*")):
        match = COPY_NAME.fullmatch(path.name)
        if match is None or match[3] or int(match[1]) in passed_over:
            continue
        with suppress(OSError, NoSnapshot, JsonError):
            found += (Snapshot(copy, int(match[1]), bool(match[2])) for copy in read_copies(path))
    return sorted(found, key=lambda each: -each.copy.seal.epoch)


def copy_index(tensors: Mapping[str, GlobalTensor]) -> bytes:
    """What a copy of these pieces would have as its index."""
    return _PieceMap.of(tensors).index


def stored_pieces(index: bytes, size: int | None = None) -> Iterator[StoredPiece]:
    """What an index says.

    Args:
        index: as JSON.
        size: bytes of the state; none: there is none, as of memory.

    Raises:
        JsonError: it is no index.
    """
    for row in expect_list(parse_json(index), "the index"):
        if len(expect_list(row, "a piece")) != 8:
            raise JsonError(f"a piece is 8 values, not {len(row)}")
        name, kind = expect_text(row[0], "a name"), expect_text(row[6], "a type")
        shapes = [tuple(expect_int(n, "a size") for n in expect_list(each, "a shape")) for each in row[1:4]]
        start, count, at = (expect_int(row[column], "a place") for column in (4, 5, 7))
        dtype = getattr(torch, kind, None)
        if not isinstance(dtype, torch.dtype) or (size is not None and at + count * dtype.itemsize > size):
            raise JsonError(f"{name} is of no type, or lies outside")
        yield StoredPiece(name, TensorPiece(Placement(*shapes), start, count, dtype), at)
