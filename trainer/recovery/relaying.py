"""A job that goes on in another layout, with fewer or more members, at the same global batch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from ...configs.errors import UserError
from ...configs.reading.layout import relaid
from ...configs.schema import Config
from ...configs.validation.general import validate
from ...parallel.comm.mesh import Mesh
from ...parallel.global_tensor import Box, GlobalTensor, Placement
from ..checkpoint.state import all_tensors
from ..metrics.peak import Peak
from ..overlap import ChunkSearch
from ..step import Stepper
from .point import RunPoint
from .restore import begin_anew
from .snapshots import Snapshot, snapshots_on_node


def relaid_for(cfg: Config, layout: str, members: int) -> Config:
    """The job in a layout that a plan names, for the members that it has.

    Raises:
        UserError: the layout is none for this job, or for so many.
    """
    laid = relaid(cfg, layout)
    problems = validate(laid, members)
    if problems:
        raise UserError(*problems)
    return laid


def fill_from(snapshots: list[Snapshot], tensors: Mapping[str, GlobalTensor]) -> bool:
    """Fills pieces of global tensors from whatever copies hold parts of them; whether all of them are there.

    Args:
        snapshots: of one step, of any layouts.
        tensors: to be filled; half filled where something is not there.
    """
    for name, mine in tensors.items():
        missing = mine.local.numel()
        done: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for theirs in (each for each in (_stored(snapshot, name) for snapshot in snapshots) if each is not None):
            if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                return False
            for part in (_common(a, b) for a in mine.boxes for b in theirs.boxes):
                if part is not None and part not in done:
                    done.add(part)
                    mine.view_of(*part).copy_(theirs.view_of(*part))
                    missing -= prod(part[1])
            if missing <= 0:
                break
        if missing > 0:
            return False
    return True


def _stored(snapshot: Snapshot, name: str) -> GlobalTensor | None:
    """A piece as it lies in a copy."""
    piece = snapshot.pieces.get(name)
    if piece is None:
        return None
    whole, offsets, local, start, count, kind = piece.described
    dtype = getattr(torch, kind)
    raw = bytearray(snapshot.copy.state[piece.at : piece.at + count * dtype.itemsize])
    data = torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return GlobalTensor(Placement(tuple(whole), tuple(offsets), tuple(local)), start, start + count, data)


def _common(one: Box, two: Box) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and sizes of what two boxes share."""
    sides = list(zip(one.offsets, one.sizes, two.offsets, two.sizes, strict=True))
    low = tuple(max(a, b) for a, _, b, _ in sides)
    sizes = tuple(min(a + n, b + m) - at for (a, n, b, m), at in zip(sides, low, strict=True))
    return (low, sizes) if all(size > 0 for size in sizes) else None


class RelaidRestore:
    """Brings the ranks of a mesh of another layout to the state of one step, from the copies of any mesh before.

    Copies are known as pieces of global tensors alone: so each rank takes what it needs from whichever copies of its
    node hold it, and the newest step for which all find everything is where they go on.

    Args:
        folder: where this node's copies are.
        peak, search, resumed: what this process knows.
    """

    def __init__(self, folder: Path, peak: Peak | None, search: ChunkSearch | None, resumed: Path | None) -> None:
        self._folder, self._known, self.resumed = folder, (peak, search), resumed
        self.point: RunPoint | None = None
        self.furthest = 0

    def meet(self, mesh: Mesh, peak: Peak | None, search: ChunkSearch | None) -> tuple[Peak | None, ChunkSearch | None]:
        """What all ranks know from now on."""
        found = mesh.gather_objects((peak or self._known[0], search or self._known[1], self.resumed))
        peaks, searches, paths = ([each for each in row if each is not None] for row in zip(*found, strict=True))
        self.resumed = paths[0] if paths else None
        return (peaks[0] if peaks else None), (searches[0] if searches else None)

    def fill(self, stepper: Stepper) -> None:
        """Fills this rank's state."""
        by_step: dict[int, list[Snapshot]] = {}
        for of_slot in snapshots_on_node(self._folder).values():
            for step, snapshot in of_slot.items():
                by_step.setdefault(step, []).append(snapshot)
        tensors = all_tensors(stepper.parts, stepper.optimizer)
        points = {step: each[0].point for step, each in by_step.items() if fill_from(each, tensors)}
        offers = stepper.mesh.gather_objects(points)
        self.furthest = max((step for each in offers for step in each), default=0)
        common = set.intersection(*(set(each) for each in offers))
        if not common:
            begin_anew(stepper)
            return
        newest = max(common)
        self.point = offers[0][newest]
        fill_from(by_step[newest], tensors)
        stepper.optimizer.loaded(tensors)
        stepper.updates.fill_(float(self.point.progress.updates))
