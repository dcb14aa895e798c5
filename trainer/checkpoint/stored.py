"""Where the bytes of a checkpoint's tensors lie. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...configs.fields import short
from ...configs.strict_json import JsonError, expect_text
from .manifest import Damaged, FileSum

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element by the names that safetensors gives to dtypes."""
_MAX_NAME = 512


@dataclass(frozen=True)
class StoredBox:
    """A part of a tensor in a file."""

    file: str
    start: int
    """First byte."""
    nbytes: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]


def checked_name(name: Any) -> str:
    """`name`, if it can be a tensor's: messages print it.

    Raises:
        JsonError: it cannot.
    """
    if len(expect_text(name, "the name of a tensor")) > _MAX_NAME or not name.isprintable():
        raise JsonError(f"{short(name)} is not the name of a tensor")
    return name


def checked_box(name: str, shape: tuple[int, ...], box: StoredBox, files: Mapping[str, FileSum]) -> StoredBox:
    """`box`, if it lies inside its tensor and its bytes inside their file.

    Raises:
        JsonError: it does not.
    """
    inside = len(box.offsets) == len(box.sizes) == len(shape) and all(
        o >= 0 and n >= 1 and o + n <= whole for o, n, whole in zip(box.offsets, box.sizes, shape, strict=True)
    )
    if not inside:
        raise JsonError(f"a box of {name} at {box.offsets} of {box.sizes} is not inside its shape {shape}")
    if box.start < 0 or box.start + box.nbytes > files[box.file].size:
        end, size = box.start + box.nbytes, files[box.file].size
        raise JsonError(f"a box of {name} ends at byte {end} of {box.file}, which has {size}")
    return box


@dataclass(frozen=True)
class BoxOverlap:
    """What one stored box gives to a box that is read."""

    stored: StoredBox
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def held_once(name: str, stored: StoredTensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[BoxOverlap]:
    """Where the elements of a box of a tensor are.

    Raises:
        Damaged: the checkpoint does not hold each of them exactly once.
    """
    low = np.array(offsets, np.int64)
    high = low + np.array(sizes, np.int64)
    firsts = np.array([b.offsets for b in stored.boxes], np.int64).reshape(len(stored.boxes), len(offsets))
    lasts = firsts + np.array([b.sizes for b in stored.boxes], np.int64).reshape(firsts.shape)
    firsts, lasts = np.maximum(firsts, low), np.minimum(lasts, high)
    touching = np.flatnonzero((firsts < lasts).all(axis=1))
    firsts, lasts = firsts[touching], lasts[touching]
    held = sum(math.prod(int(n) for n in row) for row in lasts - firsts)
    if held != math.prod(sizes) or _overlap(firsts, lasts):
        raise Damaged(f"of the {math.prod(sizes)} elements of {name} at {offsets}, it does not hold each once")
    return [
        BoxOverlap(stored.boxes[int(i)], tuple(map(int, first)), tuple(map(int, last - first)))
        for i, first, last in zip(touching, firsts, lasts, strict=True)
    ]


def _overlap(firsts: np.ndarray[Any, Any], lasts: np.ndarray[Any, Any], rows: int = 256) -> bool:
    """Whether any two of the boxes [first, last) share an element."""
    for at in range(0, len(firsts), rows):
        shared = (firsts[at : at + rows, None] < lasts[None]) & (firsts[None] < lasts[at : at + rows, None])
        if int(shared.all(axis=2).sum()) > len(firsts[at : at + rows]):  # each shares all with itself
            return True
    return False
