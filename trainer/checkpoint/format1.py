"""Checkpoints of format 1, in which torch's distributed checkpoint (DCP) kept its index as a pickle.

Nothing of the pickle runs: an operation or a name that such an index does not need is refused, and what its classes
are replaced by only remembers what it is given. The boxes are archives of `torch.save`, which `torch.load` reads with
`weights_only`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...configs.fields import short
from ...configs.strict_json import JsonError, expect_file_name, expect_int
from .manifest import OLD_INDEX, Damaged, FileSum
from .stored import ITEM_BYTES, StoredBox, StoredTensor, checked_box, checked_name

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_OPERATIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"),
}


class _Remembered:
    """Stands for an object of DCP's index: keeps the state that the pickle gives it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, key: str) -> Any:
        """A field of the object.

        Raises:
            JsonError: it has none of that name.
        """
        if not isinstance(self.state, dict) or key not in self.state:
            raise JsonError(f"an entry lacks {key}")
        return self.state[key]


class _Dtype(str):
    """Name of a dtype."""


def _size(values: Any) -> tuple[Any, ...]:
    return tuple(values)


def _ignored(*_: Any) -> None:
    """For what says nothing about where a tensor is: its memory layout, the folder it was written to."""


_DCP = "torch.distributed.checkpoint"
_NAMES: dict[tuple[str, str], Callable[..., Any] | _Dtype] = {
    **{("torch", name): _Dtype(short_name) for name, short_name in _DTYPES.items()},
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _ignored,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _ignored,
    ("pathlib", "PosixPath"): _ignored,
    ("pathlib._local", "PosixPath"): _ignored,
    **{
        (f"{_DCP}.{module}", name): type(name, (_Remembered,), {})
        for module, name in (
            ("metadata", "Metadata"),
            ("metadata", "TensorStorageMetadata"),
            ("metadata", "TensorProperties"),
            ("metadata", "ChunkStorageMetadata"),
            ("metadata", "MetadataIndex"),
            ("metadata", "StorageMeta"),
            ("filesystem", "_StorageInfo"),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of an index, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        """The harmless stand-in of a name."""
        try:
            return _NAMES[module, name]
        except KeyError:
            raise JsonError(f"it names {short(f'{module}.{name}')}, which no checkpoint needs") from None


def read_index(data: bytes, files: Mapping[str, FileSum]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint from its `.metadata`.

    Args:
        data: the verified file.
        files: of the manifest.

    Raises:
        Damaged: it is not the index of a checkpoint.
    """
    try:
        _check_operations(data)
        found = _Unpickler(io.BytesIO(data)).load()
        return _tensors(found, files)
    except JsonError as error:
        raise Damaged(f"{OLD_INDEX} is refused: {error}") from None
    except Exception as error:  # what an unpickler raises for nonsense is not documented
        raise Damaged(f"{OLD_INDEX} is refused: it is not the index of a checkpoint ({type(error).__name__})") from None


def _check_operations(data: bytes) -> None:
    """Refuses operations that an index does not need, and places in the memo that would fill the memory."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS:
            raise JsonError(f"it holds the pickle operation {operation.name}, which no checkpoint needs")
        if operation.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise JsonError("it is not the index of a checkpoint")


def _tensors(found: Any, files: Mapping[str, FileSum]) -> dict[str, StoredTensor]:
    places: dict[tuple[str, tuple[int, ...]], _Remembered] = {}
    root = _object(found)
    for index, place in root.get("storage_data").items():
        name, offset = checked_name(_object(index).get("fqn")), _object(index).get("offset")
        places[name, _ints(offset if offset is not None else (), name)] = _object(place)
    tensors: dict[str, StoredTensor] = {}
    for name, about in root.get("state_dict_metadata").items():
        shape = _ints(_object(about).get("size"), checked_name(name))
        properties = _object(_object(about).get("properties")).state
        dtype = properties[0] if isinstance(properties, tuple) and properties else None
        if not isinstance(dtype, _Dtype):
            raise JsonError(f"{name} has no known dtype")
        chunks = [_object(chunk) for chunk in about.get("chunks")]
        boxes = [
            _box(name, str(dtype), shape, (_ints(c.get("offsets"), name), _ints(c.get("sizes"), name)), places, files)
            for c in chunks
        ]
        tensors[name] = StoredTensor(str(dtype), shape, tuple(boxes))
    return tensors


def _box(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    extent: tuple[tuple[int, ...], tuple[int, ...]],
    places: Mapping[tuple[str, tuple[int, ...]], _Remembered],
    files: Mapping[str, FileSum],
) -> StoredBox:
    offsets, sizes = extent
    place = places.get((name, offsets))
    if place is None:
        raise JsonError(f"it does not say where {name} at {offsets} is")
    if place.state.get("transform_descriptors"):
        raise JsonError(f"{name} is compressed or encrypted, which pentad never did")
    file = expect_file_name(place.get("relative_path"), "a file")
    if file not in files:
        raise JsonError(f"it names {short(file)}, which the manifest does not list")
    start, length = (expect_int(place.get(key), f"{key} of {name}") for key in ("offset", "length"))
    if math.prod(sizes) * ITEM_BYTES[dtype] > length:
        raise JsonError(f"{length} bytes cannot hold {name} of {sizes}")
    return checked_box(name, shape, StoredBox(file, start, length, offsets, sizes), files)


def _object(value: Any) -> _Remembered:
    if not isinstance(value, _Remembered):
        raise JsonError("it is not the index of a checkpoint")
    return value


def _ints(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise JsonError(f"{what} has the shape {short(value)}")
    return tuple(expect_int(item, f"a size of {what}") for item in value)


def decode_box(data: bytes, box: StoredBox, dtype: torch.dtype) -> Tensor:
    """The tensor in an archive of `torch.save`.

    Raises:
        Damaged: it is another tensor than the index says, or something else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        # What is compressed could be of any size.
        if any(e.compress_type != zipfile.ZIP_STORED or e.file_size > len(data) for e in entries):
            raise Damaged(f"{box.file} holds a compressed archive at byte {box.start}")
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:80]
        raise Damaged(f"{box.file} holds no tensor at byte {box.start} ({what})") from None
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.dtype != dtype:
        raise Damaged(f"{box.file} holds another tensor at byte {box.start} than the index says")
    if tuple(tensor.shape) != box.sizes:
        raise Damaged(f"{box.file} holds {tuple(tensor.shape)} at byte {box.start}, the index says {box.sizes}")
    return tensor.detach()
