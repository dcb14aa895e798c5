"""A rank's piece of a named global tensor, as the axis-aligned boxes of which checkpoints are made.

A rank's part of a parameter is an axis-aligned slice (`Placement`); the data-parallel shares of that slice are flat
runs of its row-major elements, because parameters and optimizer states live in flat buckets. A flat run of an
n-dimensional slice is at most 2n − 1 boxes:

    run [3, 14) of a 4 × 4 slice      . . . a       boxes: a (1 × 1), b (2 × 4), c (1 × 2)
                                      b b b b
                                      b b b b
                                      c c . .
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """An axis-aligned slice of a global tensor.

    Args:
        global_shape: of the whole tensor.
        offsets: first index of the slice, per dimension.
        local_shape: of the slice.
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local_shape: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Placement:
        """The whole tensor."""
        return Placement(tuple(shape), (0,) * len(shape), tuple(shape))

    @staticmethod
    def shard(shape: tuple[int, ...], dim: int, index: int, count: int) -> Placement:
        """Slice `index` of `count` equal ones along `dim`.

        Raises:
            ValueError: the dimension does not divide.
        """
        return Placement.whole(shape).cut(dim, index, count)

    def cut(self, dim: int, index: int, count: int) -> Placement:
        """Part `index` of `count` equal ones of this slice, along `dim`.

        Raises:
            ValueError: the dimension does not divide.
        """
        size, rest = divmod(self.local_shape[dim], count)
        if rest:
            raise ValueError(f"dim {dim} of shape {self.local_shape} does not divide into {count} equal slices")
        offsets, sizes = list(self.offsets), list(self.local_shape)
        offsets[dim], sizes[dim] = offsets[dim] + index * size, size
        return Placement(self.global_shape, tuple(offsets), tuple(sizes))

    def of(self, whole: Tensor) -> Tensor:
        """The view, of shape `local_shape` (…,), of the whole tensor that this slice is."""
        for dim, (start, size) in enumerate(zip(self.offsets, self.local_shape, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a global tensor; its elements are a contiguous run of the local slice."""

    offsets: tuple[int, ...]
    """First index in the global tensor, per dimension."""
    sizes: tuple[int, ...]
    local_flat_start: int
    """First element in the local slice's row-major order."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.sizes)


def boxes(placement: Placement, flat_start: int, flat_stop: int) -> list[Box]:
    """The boxes, in order, that the row-major elements [flat_start, flat_stop) of the local slice fill.

    Raises:
        ValueError: the run is not inside the slice.
    """
    numel = math.prod(placement.local_shape)
    if not 0 <= flat_start <= flat_stop <= numel:
        raise ValueError(f"elements [{flat_start}, {flat_stop}) are not inside a slice of {numel} elements")
    found, at = [], flat_start
    for index, sizes in _runs(placement.local_shape, flat_start, flat_stop):
        offsets = tuple(i + s for i, s in zip(index, placement.offsets, strict=True))
        found.append(Box(offsets, sizes, at))
        at += found[-1].numel
    return found


def _runs(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(first index, sizes) of the boxes of the run: part of a row, whole rows, part of a row, in each dimension."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    low, high = -(-start // inner), stop // inner  # the whole rows
    if low > high:
        yield from _row(shape, high, start - high * inner, stop - high * inner)
        return
    if start < low * inner:
        yield from _row(shape, low - 1, start - (low - 1) * inner, inner)
    if low < high:
        yield (low, *(0 for _ in shape[1:])), (high - low, *shape[1:])
    if stop > high * inner:
        yield from _row(shape, high, 0, stop - high * inner)


def _row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for index, sizes in _runs(shape[1:], start, stop):
        yield (row, *index), (1, *sizes)


class GlobalTensor:
    """A rank's piece of a global tensor, which checkpoints save and load in place.

    Args:
        placement: the slice of the global tensor that the local parameter is.
        start, stop: the run of the local parameter's row-major elements that this rank holds; may be empty.
        data: those elements, 1-D and contiguous, on any device. Loading writes into it.

    Raises:
        ValueError: `data` does not have stop − start elements, or is not 1-D and contiguous.
    """

    def __init__(self, placement: Placement, start: int, stop: int, data: Tensor) -> None:
        if data.dim() != 1 or not data.is_contiguous() or data.numel() != stop - start:
            raise ValueError(
                f"elements [{start}, {stop}) need contiguous 1-D data of {stop - start} elements, "
                f"got shape {tuple(data.shape)}, strides {data.stride()}"
            )
        self.placement, self.local = placement, data.detach()
        self.boxes = tuple(boxes(placement, start, stop))

    @staticmethod
    def of(tensor: Tensor) -> GlobalTensor:
        """A whole tensor (…,), contiguous, that this rank has all of."""
        return GlobalTensor(Placement.whole(tuple(tensor.shape)), 0, tensor.numel(), tensor.detach().view(-1))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.placement.global_shape

    @property
    def start(self) -> int:
        """The first of the slice's row-major elements that this rank holds."""
        return self.boxes[0].local_flat_start if self.boxes else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.local.dtype

    def __repr__(self) -> str:
        return f"GlobalTensor({self.placement}, {len(self.boxes)} boxes, {self.local.numel()} elements, {self.dtype})"

    def view_of(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A view (sizes[0], sizes[1], …) of `local` with the elements of a box that lies inside one of `boxes`.

        Raises:
            KeyError: this rank does not hold it.
        """
        for box in self.boxes:
            inside = all(
                b <= o and o + s <= b + n for b, n, o, s in zip(box.offsets, box.sizes, offsets, sizes, strict=True)
            )
            if inside:
                view = self._view(box)
                for dim, (first, at, size) in enumerate(zip(box.offsets, offsets, sizes, strict=True)):
                    view = view.narrow(dim, at - first, size)
                return view
        raise KeyError(f"no box of {self!r} holds offsets {offsets}, sizes {sizes}")

    def _view(self, box: Box) -> Tensor:
        first = box.local_flat_start - self.boxes[0].local_flat_start
        return self.local[first : first + box.numel].view(box.sizes)
