"""Keeps copies of a rank's state while it trains, as often as their budget allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch

from ...parallel.comm.collectives import all_reduce
from ...parallel.comm.mesh import Mesh
from ...parallel.global_tensor import GlobalTensor
from ..metrics.notices import warn
from .backup import Backup
from .partners import partners
from .point import RunPoint
from .snapshots import COPY_NAME, SnapshotFile

BUDGET = 0.03
"""Share of a step's time that copies may take, on the rank that they take longest."""
_AGREE_AT = 4
"""Steps of a mesh after which the ranks agree for the first time how often copies are made; then after 4 times as many
each."""


class SnapshotKeeper:
    """This process's copies, over all meshes that it is in.

    Args:
        folder: of the job on this node, in memory.
        number: of this process in the job.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.every = 1
        """Steps from one copy to the next, the same on all ranks."""
        self.tell: Callable[..., object] | None = None
        """Told of events, on the rank that reports."""
        self._folder, self._number = folder, number
        self._file: SnapshotFile | None = None
        self._backup: Backup | None = None
        self._mesh: Mesh | None = None
        self._members: Collection[int] = ()
        self._steps = 0
        self._last = 0.0
        self._costs: list[float] = []
        self._times: list[float] = []

    def begin(self, mesh: Mesh, members: Collection[int], tensors: Mapping[str, GlobalTensor], point: RunPoint) -> None:
        """In a new mesh, from the state that its ranks have.

        Args:
            mesh: of this rank.
            members: numbers of the processes in it.
            tensors: this rank's pieces of the state.
            point: how far the state is.
        """
        self._file = self._made(tensors)
        everybody = all(mesh.gather_objects(self._file is not None))
        self._mesh, self._members, self._steps = mesh, members, 0
        self._costs, self._times = [], []
        keepers = partners(mesh.nodes, mesh.degrees)
        if self._file is not None and everybody and any(slot is not None for slot in keepers):
            source = keepers.index(mesh.rank) if mesh.rank in keepers else None
            self._backup = Backup(mesh, keepers[mesh.rank], source, self._folder / f"snapshot.{self._number}.partner")
            self._backup.begin(self._file.file)
        if self._file is not None:
            self._file.go_back(point.step)
            self._write(self._file, mesh, point)
        self._last = time.monotonic()

    def _made(self, tensors: Mapping[str, GlobalTensor]) -> SnapshotFile | None:
        """The file for copies of these pieces; None: there is no room for them."""
        if self._file is not None and self._file.follow(tensors):
            return self._file
        before = self._file
        if before is not None and not before.file.published:
            before.close()  # it has the place of the next one
            before = None
        try:
            # The copies before stay until the first one of these is there.
            return SnapshotFile(self._folder, self._number, tensors)
        except OSError as error:
            warn(
                f"{self._folder} has no room for copies of the state ({error.strerror}): after a fault the job goes on "
                "from its newest checkpoint (faults.recover)"
            )
            return None
        finally:
            if before is not None:
                before.close()

    def _write(self, file: SnapshotFile, mesh: Mesh, point: RunPoint) -> None:
        half, seal = file.write(point, mesh.epoch, mesh.rank)
        if self._backup is not None:
            self._backup.send(file.file, half, seal)

    def arrived(self) -> None:
        """Before every norm, on all ranks: returns when the last copy is with this rank's partner."""
        if self._backup is not None:
            began = time.monotonic()
            self._backup.wait()
            if self._costs:
                self._costs[-1] += time.monotonic() - began

    def after(self, point: RunPoint, *, now: bool = False) -> None:
        """After every step, on all ranks; `now`: whatever the step, a copy is made."""
        assert self._mesh is not None
        began = time.monotonic()
        self._times.append(began - self._last)
        if not self._steps:
            self._remove_others()
        self._steps += 1
        if self._file is not None and (now or point.step % self.every == 0):
            self._write(self._file, self._mesh, point)
            self._costs.append(time.monotonic() - began)
        if self._steps >= _AGREE_AT and math.log(self._steps, 4).is_integer():
            self._agree(point.step)
        self._last = time.monotonic()

    def _agree(self, step: int) -> None:
        assert self._mesh is not None
        cost = median(self._costs) if self._costs else 0.0
        mine = torch.tensor([cost, -median(self._times)], dtype=torch.float64)
        cost, seconds = all_reduce(mine, self._mesh.axis("world"), "max").wait().tolist()
        every = max(1, math.ceil(cost / (BUDGET * -seconds))) if cost else self.every
        self._costs, self._times = self._costs[-1:], []
        if self.tell is not None and self._file is not None:
            about = {"mib": self._file.file.state_bytes / 2**20, "ms": 1e3 * cost, "step_ms": -1e3 * seconds}
            self.tell("snapshots", step=step, every=every, **{name: round(value, 3) for name, value in about.items()})
        self.every = every

    def _remove_others(self) -> None:
        """All members have a copy in this mesh, for they have done a step in it: those of processes that are gone have
        had their use."""
        for path in self._folder.glob("snapshot.*"):
            match = COPY_NAME.fullmatch(path.name)
            if match is None:
                continue
            stale = int(match[1]) == self._number and bool(match[2]) and self._backup is None
            if stale or int(match[1]) not in self._members:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def leave(self) -> None:
        """The mesh is left, with an abort if others were lost."""
        backup, self._backup, self._mesh = self._backup, None, None
        if backup is not None:
            backup.close()

    def close(self) -> None:
        """Copies nothing any more. What was copied stays for others; who made the folder removes it."""
        self.leave()
        if self._file is not None:
            self._file.close()
            self._file = None
