"""Which box of which tensor is at which bytes of which file of a checkpoint. No torch here.

`tensors.json`:

    {"files": ["rank-00000-0.safetensors", …],
     "tensors": {"model/embed.weight": {"dtype": "F32", "shape": [320, 64],
                                        "boxes": [[0, 1032, [0, 0], [160, 64]], …]}}}

A box is [number of its file, first byte, first index per dimension, sizes]; its elements are row-major and in the
byte order of the machines that torch runs on (little). The files are in the safetensors format, so that other tools
read them too; Pentad itself reads only the bytes that the index names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.fields import short
from ...configs.strict_json import (
    JsonError,
    expect_file_name,
    expect_int,
    expect_list,
    expect_object,
    expect_text,
    parse_json,
)
from .manifest import FORMAT, INDEX, Damaged, FileSum, read_manifest, read_state, read_verified
from .stored import ITEM_BYTES, StoredBox, StoredTensor, checked_box, checked_name

_MAX_INDEX_BYTES = 1 << 30


@dataclass(frozen=True)
class Contents:
    """A checkpoint's folder as its verified manifest, index and state describe it."""

    path: Path
    format: int
    files: Mapping[str, FileSum]
    tensors: Mapping[str, StoredTensor]
    state: dict[str, Any]


def write_index(tensors: Mapping[str, StoredTensor]) -> bytes:
    """The text of `tensors.json`, a line per tensor."""
    files = sorted({box.file for stored in tensors.values() for box in stored.boxes})
    number = {name: i for i, name in enumerate(files)}
    lines = []
    for name, stored in tensors.items():
        boxes = [[number[b.file], b.start, b.offsets, b.sizes] for b in stored.boxes]
        about = {"dtype": stored.dtype, "shape": stored.shape, "boxes": boxes}
        lines.append(f"{json.dumps(name)}: {json.dumps(about)}")
    body = ",\n".join(lines)
    return f'{{"files": {json.dumps(files)},\n"tensors": {{\n{body}\n}}}}\n'.encode()


def read_contents(path: Path) -> Contents:
    """What a checkpoint holds; of its files only the manifest, the index and the state are read, and compared.

    Raises:
        Damaged: one of them is not as it was written, or says what cannot be.
    """
    manifest = read_manifest(path)
    index = read_verified(path, manifest.index, manifest.files[manifest.index], _MAX_INDEX_BYTES)
    state = read_state(path, manifest)
    if manifest.format == FORMAT:
        try:
            tensors = _index(parse_json(index), manifest.files)
        except JsonError as error:
            raise Damaged(f"{INDEX} is not readable ({error})") from None
    else:
        from .format1 import read_index  # needs torch, which the rest does not

        tensors = read_index(index, manifest.files)
    return Contents(path, manifest.format, manifest.files, tensors, state)


def _index(value: Any, files: Mapping[str, FileSum]) -> dict[str, StoredTensor]:
    found = expect_object(value, "it", ("files", "tensors"))
    names = [expect_file_name(name, "a file") for name in expect_list(found["files"], "files")]
    lacking = [name for name in names if name not in files]
    if lacking:
        raise JsonError(f"it names {lacking[0]}, which the manifest does not list")
    tensors = expect_object(found["tensors"], "tensors")
    return {checked_name(name): _stored(name, about, names, files) for name, about in tensors.items()}


def _stored(name: str, value: Any, names: Sequence[str], files: Mapping[str, FileSum]) -> StoredTensor:
    about = expect_object(value, name, ("dtype", "shape", "boxes"))
    dtype, shape = expect_text(about["dtype"], f"dtype of {name}"), _ints(about["shape"], f"shape of {name}")
    if dtype not in ITEM_BYTES:
        raise JsonError(f"{name} has the unknown dtype {short(dtype)}")
    boxes = []
    for box in expect_list(about["boxes"], f"boxes of {name}"):
        if len(expect_list(box, f"a box of {name}")) != 4:
            raise JsonError(f"a box of {name} has {len(box)} values instead of 4")
        file = names[expect_int(box[0], f"file of {name}", high=len(names) - 1)]
        offsets, sizes = _ints(box[2], f"offsets of {name}"), _ints(box[3], f"sizes of {name}")
        nbytes = math.prod(sizes) * ITEM_BYTES[dtype]
        start = expect_int(box[1], f"first byte of {name}")
        boxes.append(checked_box(name, shape, StoredBox(file, start, nbytes, offsets, sizes), files))
    return StoredTensor(dtype, shape, tuple(boxes))


def _ints(value: Any, what: str) -> tuple[int, ...]:
    if len(expect_list(value, what)) > 64:
        raise JsonError(f"{what} has {len(value)} dimensions")
    return tuple(expect_int(item, what) for item in value)
