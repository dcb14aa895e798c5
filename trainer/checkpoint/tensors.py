"""The bytes of a checkpoint's tensors: each rank's files in the safetensors format, and boxes read from them."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...configs.strict_json import JsonError, open_regular
from ...parallel.global_tensor import GlobalTensor
from ..processes.threads import map_threads
from .format1 import decode_box
from .index import Contents
from .manifest import FORMAT, Damaged, FileSum, SummedFile
from .stored import BoxOverlap, StoredBox, StoredTensor, held_once
from .writers import Write, memory_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by the names in the index."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FILE_BYTES = 64 << 20
"""Below this a further file per rank costs more than its thread gains."""
_THREADS = 4
_STAGE_BYTES = 64 << 20
"""Most bytes that are read at a time where they cannot be read in place."""


@dataclass(frozen=True)
class PlannedFile:
    """One file of one rank, before it is written."""

    name: str
    header: bytes
    members: tuple[int, ...]
    """Numbers of the writes whose contents follow the header, in order."""
    starts: tuple[int, ...]
    """First byte of each."""


def plan_files(rank: int, writes: Sequence[Write]) -> list[PlannedFile]:
    """How a rank's writes are laid out; a function of nothing else, so that any rank knows where everything will be.

    Raises:
        ValueError: a dtype that safetensors has no name for.
    """
    unknown = sorted({str(w.dtype) for w in writes if w.dtype not in _NAMES})
    if unknown:
        raise ValueError(f"tensors of {', '.join(unknown)} cannot be saved")
    count = min(_THREADS, 1 + sum(w.nbytes for w in writes) // _FILE_BYTES)
    shares: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for number in sorted(range(len(writes)), key=lambda i: -writes[i].nbytes):
        least = min(range(count), key=lambda i: load[i])
        shares[least].append(number)
        load[least] += writes[number].nbytes
    files = []
    for i, share in enumerate(shares):
        # The widest elements first: all of them then lie at multiples of their size.
        members = sorted(share, key=lambda n: (-writes[n].dtype.itemsize, n))
        header, starts = _header([writes[n] for n in members])
        files.append(PlannedFile(f"rank-{rank:05d}-{i}.safetensors", header, tuple(members), starts))
    return files


def _header(writes: Sequence[Write]) -> tuple[bytes, tuple[int, ...]]:
    """The header of a safetensors file and the first byte of each of its tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for write in writes:
        ends.append(ends[-1] + write.nbytes)
        name = write.name
        if write.sizes != write.shape:
            spans = zip(write.offsets, write.sizes, strict=True)
            name += f"[{', '.join(f'{o}:{o + n}' for o, n in spans)}]"
        entries[name] = {"dtype": _NAMES[write.dtype], "shape": write.sizes, "data_offsets": ends[-2:]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, tuple(len(header) + start for start in ends[:-1])


def index_of(everyone: Sequence[Sequence[Write]]) -> dict[str, StoredTensor]:
    """Where all ranks' writes will be, tensor by tensor."""
    about: dict[str, Write] = {}
    boxes: dict[str, list[StoredBox]] = {}
    for rank, writes in enumerate(everyone):
        for file in plan_files(rank, writes):
            for number, start in zip(file.members, file.starts, strict=True):
                w = writes[number]
                about.setdefault(w.name, w)
                boxes.setdefault(w.name, []).append(StoredBox(file.name, start, w.nbytes, w.offsets, w.sizes))
    return {
        name: StoredTensor(
            _NAMES[about[name].dtype], about[name].shape, tuple(sorted(boxes[name], key=lambda b: b.offsets))
        )
        for name in sorted(boxes)
    }


def write_files(folder: Path, files: Sequence[PlannedFile], data: Sequence[Tensor]) -> dict[str, FileSum]:
    """Writes a rank's files, several at a time, and forces them to disk.

    Args:
        folder: where.
        files: of `plan_files`.
        data: the contents of the writes, on the host.
    """

    def write(file: PlannedFile) -> FileSum:
        with SummedFile(folder / file.name) as out:
            out.write(file.header)
            for number in file.members:
                out.write(memory_of(data[number]))
            return out.finish()

    return dict(zip((file.name for file in files), map_threads(write, files, _THREADS), strict=True))


class TensorFiles:
    """Reads the boxes of a checkpoint's tensors. Close it after use, or use it in a `with`.

    Args:
        contents: of the checkpoint, whose files have been verified.
    """

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for fd in self._open.values():
            os.close(fd)
        self._open = {}

    def parts(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[BoxOverlap]:
        """Where the elements of a box of a tensor are.

        Raises:
            Damaged: the checkpoint does not hold each of them exactly once.
        """
        return held_once(name, self.contents.tensors[name], offsets, sizes)

    def read(self, wanted: Mapping[str, GlobalTensor]) -> None:
        """Reads pieces in place, several boxes at a time.

        Raises:
            Damaged: the checkpoint does not hold what its index says; found before anything is read where possible.
            OSError: a file cannot be read.
        """
        jobs: list[tuple[BoxOverlap, torch.dtype, Tensor]] = []
        for name, piece in wanted.items():
            dtype = DTYPES[self.contents.tensors[name].dtype]
            for box in piece.boxes:
                out = piece.view_of(box.offsets, box.sizes)
                for part in self.parts(name, box.offsets, box.sizes):
                    inside = out
                    for dim, (at, first, size) in enumerate(zip(part.offsets, box.offsets, part.sizes, strict=True)):
                        inside = inside.narrow(dim, at - first, size)
                    jobs.append((part, dtype, inside))
        # Neighbours in a file one after the other.
        jobs.sort(key=lambda job: (job[0].stored.file, job[0].stored.start))
        map_threads(lambda job: self._read(*job), jobs, _THREADS)

    def _read(self, part: BoxOverlap, dtype: torch.dtype, out: Tensor) -> None:
        box = part.stored
        inner = tuple(at - first for at, first in zip(part.offsets, box.offsets, strict=True))
        if self.contents.format != FORMAT:
            data = bytearray(box.nbytes)
            self._fill(box.file, box.start, memoryview(data))
            whole = decode_box(bytes(data), box, dtype)
            for dim, (at, size) in enumerate(zip(inner, part.sizes, strict=True)):
                whole = whole.narrow(dim, at, size)
            out.copy_(whole)
            return
        strides = tuple(math.prod(box.sizes[dim + 1 :]) for dim in range(len(box.sizes)))
        self._read_rows(box, dtype, inner, strides, out)

    def _read_rows(
        self, box: StoredBox, dtype: torch.dtype, inner: tuple[int, ...], strides: tuple[int, ...], out: Tensor
    ) -> None:
        """The elements of a box from `inner` on: all bytes from the first to the last, in parts if they are many."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(out.shape, strides, strict=True))
        start = box.start + dtype.itemsize * sum(at * stride for at, stride in zip(inner, strides, strict=True))
        if span == out.numel() and out.is_contiguous() and out.device.type == "cpu" and out.dtype == dtype:
            self._fill(box.file, start, memory_of(out))
            return
        cut = next((dim for dim, size in enumerate(out.shape) if size > 1), None)
        if span * dtype.itemsize > _STAGE_BYTES and cut is not None:
            half = out.shape[cut] // 2
            later = tuple(at + half if dim == cut else at for dim, at in enumerate(inner))
            self._read_rows(box, dtype, inner, strides, out.narrow(cut, 0, half))
            self._read_rows(box, dtype, later, strides, out.narrow(cut, half, out.shape[cut] - half))
            return
        stage = torch.empty(span, dtype=dtype)
        self._fill(box.file, start, memory_of(stage))
        out.copy_(stage.as_strided(tuple(out.shape), strides))

    def _fill(self, file: str, start: int, memory: memoryview) -> None:
        fd, at = self._file(file), 0
        while at < len(memory):
            count = os.preadv(fd, [memory[at : at + (1 << 30)]], start + at)
            if count == 0:
                raise Damaged(f"{file} ends at byte {start + at}")
            at += count

    def _file(self, name: str) -> int:
        with self._lock:
            if name not in self._open:
                try:
                    self._open[name] = open_regular(self.contents.path / name)
                except JsonError as error:
                    raise Damaged(f"{name} is {error}") from None
            return self._open[name]
