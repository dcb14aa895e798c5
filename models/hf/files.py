"""The files of a Hugging Face folder: JSON, and the tensors of its safetensors files by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.strict_json import JsonError, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_LISTED = 8
_LFS = b"version https://git-lfs"
_FLOATS = ("BF16", "F16", "F32", "F64")
_CONVERT = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT)"

Notice = Callable[[str], None]
"""Called with one line that the user should see."""


def to_stderr(line: str) -> None:
    """A `Notice`."""
    print(f"pentad: {line}", file=sys.stderr, flush=True)


def some(names: list[str]) -> str:
    """The first few of many names."""
    rest = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def read_hf_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder.

    Raises:
        UserError: if there is none, or it is not a JSON object.
    """
    folder = Path(directory)
    snapshots = sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    if snapshots and not (folder / "config.json").exists():
        raise UserError(f"{folder} is a model's cache; name its snapshot: {snapshots[-1]}")
    return read_hf_json(folder / "config.json")


def read_hf_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a Hugging Face folder.

    Raises:
        UserError: if the file is absent, cannot be read, or holds something else.
    """
    try:
        found = read_json(path.resolve())  # in a cache of the Hugging Face hub every file is a link
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a Hugging Face folder has config.json and *.safetensors") from None
    except NotADirectoryError:
        raise UserError(f"{path.parent} is a file; name the folder that holds it") from None
    except (OSError, JsonError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file, under the name that it has there."""

    handle: Any
    name: str
    file: str
    alias: bool = False
    """It is listed under another name than that in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return self.handle.get_slice(self.name).get_dtype()

    def read(self) -> Tensor:
        """All of it."""
        return self.handle.get_tensor(self.name)

    def part(self, index: tuple[slice, ...]) -> Tensor:
        """What one slice per dimension selects; the whole tensor is not copied out of the mapped file."""
        if index == tuple(slice(0, size) for size in self.shape):
            return self.read()
        return self.handle.get_slice(self.name)[index]


def open_files(directory: Path, stack: ExitStack, notice: Notice) -> dict[str, Stored]:
    """The tensors of the folder's safetensors files by name, also under the names that the files' metadata gives as
    aliases of shared tensors (`safetensors.torch.save_model`); files are mapped, not loaded.

    Where there is one file and an index of shards as well, the one file is taken, as transformers does.

    Raises:
        UserError: for absent, damaged or contradicting files.
    """
    single, index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if single and index:
        notice(f"{directory} has {SINGLE} and {INDEX}; {SINGLE} is read, as transformers does")
    if not single and not index:
        raise _nothing_there(directory)
    listed = {} if single else _weight_map(directory)
    stored: dict[str, Stored] = {}
    aliases: dict[str, str] = {}
    for file in [SINGLE] if single else sorted(set(listed.values())):
        handle = stack.enter_context(_opened(directory / file))
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            found = Stored(handle, name, file)
            stored[name] = _one_of(directory, stored[name], found) if name in stored else found
        aliases |= handle.metadata() or {}
    if wrong := [name for name, file in listed.items() if name not in stored]:
        places = sorted({listed[name] for name in wrong})
        raise UserError(f"{directory / INDEX} says that {some(places)} has {some(wrong)}, which is not there")
    for alias, name in aliases.items():
        if alias not in stored and name in stored:
            stored[alias] = replace(stored[name], alias=True)
    return stored


def check_types(stored: Mapping[str, Stored], where: str) -> None:
    """Refuse quantised tensors, whose numbers mean nothing without their scales.

    Raises:
        UserError: naming some of them.
    """
    wrong = {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype not in _FLOATS}
    if wrong:
        kinds = ", ".join(sorted(set(wrong.values())))
        message = f"{where} has {len(wrong)} tensors of type {kinds}, only {', '.join(_FLOATS)} are supported"
        raise UserError(f"{message}; convert quantised weights first: {some(list(wrong))}")


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor to file, from the index; the files exist and lie in the folder."""
    path = directory / INDEX
    found = read_hf_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} has no weight_map")
    files = sorted({str(file) for file in found.values()})
    # The names alone decide: in a cache of the Hugging Face hub every file is a link out of the folder.
    outside = [file for file in files if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts]
    if outside:
        raise UserError(f"{path} names files outside of its folder: {some(outside)}")
    if wrong := [file for file in files if not file.endswith(".safetensors")]:
        raise UserError(f"{path} names files that are not safetensors: {some(wrong)}")
    if absent := [file for file in files if not (directory / file).is_file()]:
        raise UserError(f"{path} lists {len(absent)} missing files: {some(absent)}")
    return {name: str(file) for name, file in found.items()}


def _one_of(directory: Path, one: Stored, other: Stored) -> Stored:
    """One of two tensors of the same name.

    Raises:
        UserError: if they differ.
    """
    if one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.read(), other.read()):
        return one
    raise UserError(f"{directory}: {one.name} is in {one.file} and in {other.file} with different values")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        hint = ""
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                hint = "; it is a pointer of Git LFS: run git lfs pull"
        raise UserError(f"{path} is damaged or not safetensors: {error}{hint}") from None


def _nothing_there(directory: Path) -> UserError:
    """Why a folder has no weights that can be read, and the way on."""
    names = sorted(path.name for path in directory.iterdir())
    shards = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    other = [name for name in names if name.endswith((".safetensors", ".gguf", ".msgpack", ".h5"))]
    way = "copy the model's *.safetensors there"
    if shards:
        way = f"the shards are there ({some(shards)}), copy their index too"
    elif "adapter_config.json" in names:
        way = "it holds an adapter; merge it into its base model first (peft: merge_and_unload, save_pretrained)"
    elif pickles:
        way = f"pickles are not read, for they can run code; with transformers: {_CONVERT}"
    found = some(pickles + other) or "none"
    return UserError(Problem("", f"{directory} has neither {SINGLE} nor {INDEX} (other weight files: {found}); {way}"))
