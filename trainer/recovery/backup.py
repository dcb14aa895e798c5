"""A rank's copies on another node: sent over a lane beside the compute, kept by a rank there.

    step n     copy n ─┐                                           ┌─ norm of n + 1: every rank's copy n is kept twice
    lane               └── to the partner; from another rank ──────┘

A rank comes to the norm of step n + 1 only when its copy of step n is with its partner. So when any rank has committed
n + 1 and made the copy of it, the copies of n are there of all ranks, twice: whichever node is lost, n can be provided.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...parallel.comm.collectives import receive, send
from ...parallel.comm.lane import Lane, Pending
from ...parallel.comm.mesh import Mesh
from .copy_file import CopyFile, Seal

_SIZES = 2


class Backup:
    """This rank's end of the way while a mesh stands.

    Args:
        mesh: with the axis `backup`.
        to: the slot that keeps this rank's copies; none: there is none.
        source: the slot whose copies this rank keeps; none: there is none.
        path: of the file for those.
    """

    def __init__(self, mesh: Mesh, to: int | None, source: int | None, path: Path) -> None:
        self._axis, self._to, self._source, self._path = mesh.axis("backup"), to, source, path
        self._lane = Lane("backup", "cpu", self._axis)
        self._pending: Pending[None] | None = None
        self._theirs: CopyFile | None = None

    def begin(self, file: CopyFile) -> None:
        """Tells the partner what will come."""
        self._pending = self._lane.submit(lambda: self._introduce(file))

    def send(self, file: CopyFile, half: int, seal: Seal) -> None:
        """Begins to bring a copy there; the half must not change until `wait` has returned."""
        self.wait()
        self._pending = self._lane.submit(lambda: self._exchange(file, half, seal))

    def wait(self) -> None:
        """Returns when the copy that was sent last is with the partner.

        Raises:
            Aborted, Overdue: see `Abort.wait`.
            PeerGone: the partner is lost.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def close(self) -> None:
        """Ends it; what was kept stays."""
        self._lane.close()
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    def _swap(self, mine: Tensor, into: Tensor) -> None:
        """Sends to the partner and receives from the other one, where there are such."""
        flights = [] if self._to is None else [send(mine, self._axis, self._to)]
        if self._source is not None:
            flights.append(receive(into, self._axis, self._source))
        for flight in flights:
            flight.wait()

    def _introduce(self, file: CopyFile) -> None:
        sizes = torch.zeros(_SIZES, dtype=torch.int64)
        self._swap(torch.tensor([len(file.index), file.state_bytes]), sizes)
        index = torch.empty(int(sizes[0]), dtype=torch.uint8)
        self._swap(torch.frombuffer(bytearray(file.index), dtype=torch.uint8), index)
        if self._source is not None:
            self._theirs = CopyFile(self._path, index.numpy().tobytes(), int(sizes[1]))

    def _exchange(self, file: CopyFile, half: int, seal: Seal) -> None:
        words = torch.zeros(len(seal.words), dtype=torch.int64)
        self._swap(torch.tensor(seal.words), words)
        mine, theirs = torch.frombuffer(file.body(half), dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
        place = int(words[0]) % 2
        if self._theirs is not None:
            self._theirs.open(place)
            theirs = torch.frombuffer(self._theirs.body(place), dtype=torch.uint8)
        self._swap(mine, theirs)
        if self._theirs is not None:
            self._theirs.seal(place, Seal(*words.tolist()[:-1]))
