"""A job that goes on in another layout, with fewer or more members, at the same global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...configs.errors import UserError
from ...configs.reading.layout import relaid
from ...configs.schema import Config
from ...configs.validation.general import validate
from ...parallel.comm.mesh import Mesh
from ...parallel.global_tensor import Box, GlobalTensor, Placement, boxes
from ..checkpoint.state import all_tensors
from ..metrics.peak import Peak
from ..overlap import ChunkSearch
from ..step import Stepper
from .point import RunPoint
from .restore import begin_anew
from .snapshots import Snapshot, StoredPiece, snapshots_by_step


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


@dataclass(frozen=True)
class _Part:
    """A box of a global tensor that is taken from a copy."""

    snapshot: Snapshot
    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def cover(snapshots: Sequence[Snapshot], tensors: Mapping[str, GlobalTensor]) -> list[_Part] | None:
    """Where pieces of global tensors are found in copies of one step, of any layouts; None: not all of them are there.

    Args:
        snapshots: those that come first are preferred. Their states are not read.
        tensors: what is wanted.
    """
    found = list[_Part]()
    for name, mine in tensors.items():
        # Copies of several layouts overlap anyhow: which elements are found is noted one by one.
        count = mine.local.numel()
        there = GlobalTensor(mine.placement, mine.start, mine.start + count, torch.zeros(count, dtype=torch.bool))
        for snapshot in snapshots:
            piece = None if there.local.all() else snapshot.pieces.get(name)
            if piece is None:
                continue
            placement, start, elements, dtype = _place(piece)
            if placement.global_shape != mine.shape or dtype != mine.dtype:
                return None
            for part in (_common(a, b) for a in mine.boxes for b in boxes(placement, start, start + elements)):
                if part is not None and not there.view_of(*part).all():
                    there.view_of(*part).fill_(True)
                    found.append(_Part(snapshot, name, *part))
        if not there.local.all():
            return None
    return found


def fill_from(parts: Sequence[_Part], tensors: Mapping[str, GlobalTensor]) -> None:
    """Copies what `cover` found; the last one of what is found twice."""
    read: dict[tuple[int, str], GlobalTensor] = {}
    for part in parts:
        key = id(part.snapshot), part.name
        if key not in read:
            read[key] = _stored(part.snapshot, part.snapshot.pieces[part.name])
        tensors[part.name].view_of(part.offsets, part.sizes).copy_(read[key].view_of(part.offsets, part.sizes))


def _place(piece: StoredPiece) -> tuple[Placement, int, int, torch.dtype]:
    """Slice, first element and elements of a piece in a copy, and their type."""
    whole, offsets, local, start, count, kind = piece.described
    return Placement(tuple(whole), tuple(offsets), tuple(local)), start, count, getattr(torch, kind)


def _stored(snapshot: Snapshot, piece: StoredPiece) -> GlobalTensor:
    """A piece as it lies in a copy."""
    placement, start, count, dtype = _place(piece)
    raw = bytearray(snapshot.copy.state[piece.at : piece.at + count * dtype.itemsize])
    data = torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return GlobalTensor(placement, start, start + count, data)


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
        by_step, tensors = snapshots_by_step(self._folder), all_tensors(stepper.parts, stepper.optimizer)
        found = {step: cover(snapshots, tensors) for step, snapshots in by_step.items()}
        while True:
            points = {step: by_step[step][0].point for step, parts in found.items() if parts is not None}
            offers = stepper.mesh.gather_objects(points)
            self.furthest = max((step for each in offers for step in each), default=self.furthest)
            common = set.intersection(*(set(each) for each in offers))
            if not common:
                begin_anew(stepper)
                return
            newest = max(common)
            parts = found[newest] or []
            if all(stepper.mesh.gather_objects(all(part.snapshot.copy.is_sound for part in parts))):
                break
            by_step[newest] = [snapshot for snapshot in by_step[newest] if snapshot.copy.is_sound]
            found[newest] = cover(by_step[newest], tensors)
        self.point = offers[0][newest]
        fill_from(parts, tensors)
        stepper.optimizer.loaded(tensors)
        stepper.updates.fill_(float(self.point.progress.updates))
