"""What the ranks of a job hold and write, known of every rank without asking it."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pentad.parallel.comm.mesh import Degrees
from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.parallel.record.files import RingFile
from pentad.trainer.checkpoint import files
from pentad.trainer.checkpoint.io import Published
from pentad.trainer.checkpoint.manifest import FileSum, read_manifest
from pentad.trainer.checkpoint.tensors import PlannedFile, plan_files
from pentad.trainer.checkpoint.writers import Holding, Write, assign

_MATRICES, _ROWS, _COLUMNS = 8, 64, 256
_NORMS = 4


def state_of(degrees: Degrees, rank: int) -> dict[str, GlobalTensor]:
    """What a rank holds: flat runs of the matrices of its stage, spread over the replicas, and whole norms."""
    stage, rest = divmod(rank, degrees.world // degrees.pp)
    replica, shard = divmod(rest, degrees.tp)
    slice_size = _ROWS * _COLUMNS // degrees.tp
    share = _MATRICES * slice_size // degrees.dp
    first, last = replica * share, (replica + 1) * share
    found: dict[str, GlobalTensor] = {}
    for number in range(_MATRICES):
        start, stop = max(first - number * slice_size, 0), min(last - number * slice_size, slice_size)
        if start < stop:
            placement = Placement.shard((_ROWS, _COLUMNS), 0, shard, degrees.tp)
            for kind in ("model", "m", "v"):
                name = f"{kind}/layers.{stage}.{number}.weight"
                found[name] = GlobalTensor(placement, start, stop, torch.zeros(stop - start))
    for number in range(_NORMS):
        found[f"model/layers.{stage}.{number}.norm"] = GlobalTensor.of(torch.zeros(_ROWS))
    return found


class FilesOfOthers:
    """What the ranks of a job say about a save, and the files that they write.

    Args:
        degrees: of the mesh.
        node: ranks on a node.
    """

    def __init__(self, degrees: Degrees, node: int) -> None:
        self._node = node
        self.holdings = [
            {name: Holding.of(tensor) for name, tensor in state_of(degrees, rank).items()}
            for rank in range(degrees.world)
        ]
        self._planned = [
            [(file, _content(file, writes)) for file in plan_files(rank, writes)]
            for rank, writes in enumerate(assign(self.holdings))
        ]
        self._names = {name for mine in self.holdings for name in mine}
        self._step, self._saving = Path(), False

    def begin(self, step: Path) -> None:
        """A save of this folder is next."""
        self._step, self._saving = step, True

    def end(self) -> None:
        """It is published."""
        self._saving = False

    def answer(self, rank: int, mine: Any) -> Any:
        """What a rank says where another one says `mine`."""
        if isinstance(mine, list) and len(mine) == 1:
            return [self._of(rank, mine[0])]
        if isinstance(mine, set) and mine & self._names:
            return set(self.holdings[rank])
        if self._saving and rank == 0:
            files.temporary(self._step).mkdir(parents=True, exist_ok=True)
            return Published(0, ()) if mine is None else mine
        return read_manifest(self._step) if rank == 0 and mine is None else mine

    def _of(self, rank: int, mine: Any) -> Any:
        if isinstance(mine, dict) and mine and isinstance(next(iter(mine.values())), Holding):
            return self.holdings[rank]
        if isinstance(mine, str):
            return f"node-{rank // self._node}"
        if isinstance(mine, RingFile):
            return replace(mine, rank=rank)
        if self._saving and isinstance(mine, tuple):
            return {file.name: self._write(file.name, data) for file, data in self._planned[rank]}, []
        return mine

    def _write(self, name: str, data: bytes) -> FileSum:
        folder = files.temporary(self._step)
        if not (folder / name).exists():
            (folder / name).write_bytes(data)
        return FileSum(len(data), zlib.crc32(data))


def _content(file: PlannedFile, writes: list[Write]) -> bytes:
    return file.header + bytes(sum(writes[number].nbytes for number in file.members))
