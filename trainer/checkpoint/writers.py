"""Who writes which part of which tensor, and the copies on the host that are written.

The plan is made once per layout, before anything is copied: every element of every tensor is written by exactly one
rank, replicas are dealt out to the ranks with the least to write, and a rank copies only what it writes.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...parallel.global_tensor import GlobalTensor

_SEGMENT_BYTES = 512 << 20
_ALIGN = 64
_PAGE, _TOUCHED = 4096, 16 << 20
"""Bytes that the kernel gives at once, or a part of it; those that are touched in one go."""

Extent = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a box of a global tensor."""


@dataclass(frozen=True)
class Holding:
    """What one rank holds of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pinned: bool
    extents: tuple[Extent, ...]

    @staticmethod
    def of(tensor: GlobalTensor) -> Holding:
        """What a rank's piece covers."""
        extents = tuple((box.offsets, box.sizes) for box in tensor.boxes)
        return Holding(tuple(tensor.shape), tensor.dtype, tensor.local.is_cuda, extents)


@dataclass(frozen=True)
class Write:
    """One box that one rank writes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return math.prod(self.sizes) * self.dtype.itemsize


def assign(holdings: Sequence[Mapping[str, Holding]], *, complete: bool = True) -> list[list[Write]]:
    """What each rank writes, given what each holds.

    Args:
        holdings: of each rank.
        complete: they hold everything together.

    Raises:
        ValueError: ranks disagree about a tensor's shape or dtype, or nobody holds a part of what is complete.
    """
    holders: dict[str, dict[Extent, list[int]]] = defaultdict(lambda: defaultdict(list))
    about: dict[str, Holding] = {}
    for rank, mine in enumerate(holdings):
        for name, holding in mine.items():
            known = about.setdefault(name, holding)
            if (known.shape, known.dtype) != (holding.shape, holding.dtype):
                raise ValueError(
                    f"{name} is {known.shape} {known.dtype} on one rank and {holding.shape} {holding.dtype} on {rank}"
                )
            for extent in holding.extents:
                holders[name][extent].append(rank)
    writes: list[list[Write]] = [[] for _ in holdings]
    load = [0] * len(holdings)
    choices: list[tuple[Write, list[int]]] = []
    for name, holding in about.items():
        parts = _disjoint(list(holders[name]))
        covered, volume = sum(math.prod(sizes) for (_, sizes), _ in parts), math.prod(holding.shape)
        if complete and covered != volume:
            raise ValueError(f"{name} has {volume} elements, the ranks together hold {covered}")
        for (offsets, sizes), whole in parts:
            choices.append((Write(name, holding.shape, holding.dtype, offsets, sizes), holders[name][whole]))
    # What only one rank has comes first, then the largest: replicas fill up the ranks that have little to do.
    for write, ranks in sorted(choices, key=lambda c: (len(c[1]) > 1, -c[0].nbytes)):
        rank = min(ranks, key=lambda r: load[r])
        writes[rank].append(write)
        load[rank] += write.nbytes
    return writes


def _disjoint(extents: list[Extent]) -> list[tuple[Extent, Extent]]:
    """(part, the extent that it is a part of): the union without overlaps, by a sweep along the longest dimension."""
    if not extents or not extents[0][0]:
        return [(extent, extent) for extent in extents[:1]]
    ends = [max(offsets[d] + sizes[d] for offsets, sizes in extents) for d in range(len(extents[0][0]))]
    along = max(range(len(ends)), key=lambda d: ends[d])
    parts: list[tuple[Extent, Extent]] = []
    active: list[tuple[int, Extent]] = []  # by their end along the sweep
    for extent in sorted(extents, key=lambda e: (e[0][along], e)):
        del active[: bisect_right(active, extent[0][along], key=lambda a: a[0])]
        pieces = [extent]
        for _, other in active:
            pieces = [rest for piece in pieces for rest in _minus(piece, other)]
        for piece in pieces:
            insort(active, (piece[0][along] + piece[1][along], piece))
            parts.append((piece, extent))
    return parts


def _minus(one: Extent, other: Extent) -> list[Extent]:
    """The parts of `one` outside `other`."""
    offsets, sizes = one
    low = [max(a, b) for a, b in zip(offsets, other[0], strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, *other, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return [one]
    rest: list[Extent] = []
    start, stop = list(offsets), [a + n for a, n in zip(offsets, sizes, strict=True)]
    for dim in range(len(start)):
        for first, last in ((start[dim], low[dim]), (high[dim], stop[dim])):
            if first < last:
                a, b = [*start], [*stop]
                a[dim], b[dim] = first, last
                rest.append((tuple(a), tuple(y - x for x, y in zip(a, b, strict=True))))
        start[dim], stop[dim] = low[dim], high[dim]
    return rest


class HostBuffers:
    """Copies on the host of what this rank writes, reused by every save of a layout.

    Each copy lies in one of a few large pieces of memory, pinned where the source is on a GPU.
    """

    def __init__(self, writes: Sequence[Write], *, pinned: bool) -> None:
        self.tensors: list[Tensor] = []
        self._segments: list[np.ndarray] = []
        self._wanted = False
        segment: list[Write] = []
        for write in writes:
            if segment and _aligned(segment) + write.nbytes > _SEGMENT_BYTES:
                self._allocate(segment, pinned)
                segment = []
            segment.append(write)
        if segment:
            self._allocate(segment, pinned)

    def _allocate(self, segment: list[Write], pinned: bool) -> None:
        size, at = _aligned(segment), 0
        # numpy asks the kernel for huge pages, which it gives in less than half the time.
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() if pinned else np.empty(size, np.uint8)
        self._segments.append(memory)
        for write in segment:
            flat = torch.frombuffer(memory, dtype=write.dtype, count=math.prod(write.sizes), offset=at)
            self.tensors.append(flat.view(write.sizes))
            at += _aligned([write])

    def touch(self) -> None:
        """Writes to every page once, until `fill` is to come."""
        for segment in self._segments:
            for at in range(0, len(segment), _TOUCHED):
                if self._wanted:
                    return
                segment[at : at + _TOUCHED : _PAGE] = 0

    def want(self) -> None:
        """Ends `touch`: who fills touches what is left."""
        self._wanted = True

    def fill(self, writes: Sequence[Write], tensors: Mapping[str, GlobalTensor]) -> None:
        """Copies the boxes; on return the sources may change."""
        devices: set[torch.device] = set()
        for write, host in zip(writes, self.tensors, strict=True):
            source = tensors[write.name].view_of(write.offsets, write.sizes)
            devices.add(source.device)
            if source.device.type == "cpu" and source.is_contiguous() and source.dtype == host.dtype:
                memory_of(host)[:] = memory_of(source)  # twice as fast on one thread as torch's copy
            else:
                host.copy_(source, non_blocking=True)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _aligned(writes: Sequence[Write]) -> int:
    return sum(-(-write.nbytes // _ALIGN) * _ALIGN for write in writes)
