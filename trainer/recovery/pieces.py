"""Which pieces of global tensors travel when ranks come to hold others than they held: every byte at most once.

What a rank holds itself it keeps; of the rest each element comes from exactly one place. So the bytes that travel are
those that each rank wants and does not hold, and no way of filling the ranks moves fewer.

    wanted by a rank      │ layer 3 │ layer 4 │ layer 5 │
    held by it            │ layer 3 │         │         │      stays
    held by others                  │ layer 4 │ layer 5 │      moves, from whichever comes first
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from ...parallel.global_tensor import Box, Placement, boxes

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a global tensor."""


@dataclass(frozen=True)
class TensorPiece:
    """A run of the row-major elements of a slice of a global tensor.

    Args:
        placement: the slice.
        start, count: the run.
        dtype: of the elements.
    """

    placement: Placement
    start: int
    count: int
    dtype: torch.dtype

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Of which it is made."""
        return tuple(boxes(self.placement, self.start, self.start + self.count))

    def fits(self, other: TensorPiece) -> bool:
        """Whether both are of tensors of one shape and type."""
        return self.dtype == other.dtype and self.placement.global_shape == other.placement.global_shape


@dataclass(frozen=True)
class HeldPiece:
    """A piece that somebody holds.

    Args:
        rank: who.
        source: in which of its sources.
        piece: what.
    """

    rank: int
    source: int
    piece: TensorPiece


@dataclass(frozen=True)
class Move:
    """A part of a global tensor that a rank takes from a place.

    Args:
        rank, source: the place, as of `HeldPiece`.
        name: of the tensor.
        region: which part.
        nbytes: of it.
    """

    rank: int
    source: int
    name: str
    region: Region
    nbytes: int


def moves(
    rank: int, wanted: Mapping[str, TensorPiece], held: Mapping[str, Sequence[HeldPiece]], world: int
) -> list[Move] | None:
    """What a rank takes, and from where: first from itself, then from the ranks behind it, in a circle.

    Args:
        rank: which.
        wanted: the pieces that it is to have, by name.
        held: what all ranks hold, by name; of a rank what it takes first comes first.
        world: how many ranks there are.

    Returns:
        None: some of it is held by nobody.
    """
    found: list[Move] = []
    for name, piece in wanted.items():
        missing: list[Region] = [(box.offsets, box.sizes) for box in piece.boxes]
        places = (each for each in held.get(name, ()) if each.piece.fits(piece))
        for place in sorted(places, key=lambda each: (each.rank - rank) % world):
            if not missing:
                break
            taken, missing = _taken(missing, place.piece.boxes)
            found += (
                Move(place.rank, place.source, name, region, prod(region[1]) * piece.dtype.itemsize) for region in taken
            )
        if missing:
            return None
    return found


def _taken(missing: list[Region], there: Sequence[Box]) -> tuple[list[Region], list[Region]]:
    """The parts of regions that boxes hold, disjoint, and what is left of the regions."""
    taken: list[Region] = []
    for box in there:
        left: list[Region] = []
        for region in missing:
            part = common(region, (box.offsets, box.sizes))
            if part is None:
                left.append(region)
            else:
                taken.append(part)
                left += without(region, part)
        missing = left
    return taken, missing


def common(one: Region, two: Region) -> Region | None:
    """What two regions share."""
    sides = list(zip(*one, *two, strict=True))
    low = tuple(max(a, b) for a, _, b, _ in sides)
    sizes = tuple(min(a + n, b + m) - at for (a, n, b, m), at in zip(sides, low, strict=True))
    return (low, sizes) if all(size > 0 for size in sizes) else None


def without(region: Region, part: Region) -> Iterator[Region]:
    """What is left of a region when a part that lies inside is taken out: in each dimension what is before it and
    behind it, of what the dimensions before have in common with it."""
    offsets, sizes = list(region[0]), list(region[1])
    for dim, (at, size) in enumerate(zip(*part, strict=True)):
        before, behind = at - offsets[dim], offsets[dim] + sizes[dim] - at - size
        for first, count in ((offsets[dim], before), (at + size, behind)):
            if count:
                yield (*offsets[:dim], first, *offsets[dim + 1 :]), (*sizes[:dim], count, *sizes[dim + 1 :])
        offsets[dim], sizes[dim] = at, size
