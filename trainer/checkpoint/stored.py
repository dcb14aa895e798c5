"""Where the bytes of a checkpoint's tensors lie. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...configs.fields import short
from ...configs.strict_json import JsonError, expect_text
from .manifest import FileSum

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
