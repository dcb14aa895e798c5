"""Hugging Face folders (config.json and safetensors) in and out, without transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configs.errors import Problem, UserError
from ..configs.schema import ModelConfig
from .hf_config import hf_config, hf_family, model_config_from_hf
from .hf_names import Link, base_prefix, is_buffer, links
from .transformer import Transformer

__all__ = [
    "hf_config",
    "hf_family",
    "hf_weights",
    "load_hf",
    "model_config_from_hf",
    "read_hf_config",
    "read_hf_weights",
    "write_hf",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # transformers' own default used to be 5 GB; hubs and readers cope with it

_MAX_LISTED = 8


def read_hf_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder.

    Raises:
        UserError: if there is none, or it is not a JSON object.
    """
    return _read_json(Path(directory) / "config.json")


def load_hf(directory: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Transformer:
    """A Hugging Face folder as a module: ``module(tokens (B, T)) -> logits (B, T, V)``.

    Args:
        directory: folder with config.json and *.safetensors, one file or shards with an index.
        dtype: type of the parameters; the file's values are cast.

    Raises:
        UserError: for an unsupported model, missing or unexpected tensors, or damaged files.
    """
    config = model_config_from_hf(read_hf_config(directory))
    module = Transformer(config).to(dtype)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in hf_weights(directory, config):
            parameters[name].copy_(tensor)
    return module


def hf_weights(directory: str | os.PathLike[str], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our parameters (name, tensor in the file's dtype) one after another, so that only one has to be in memory.

    All names and shapes are checked before the first one; a tensor may be a view of a larger one.

    Raises:
        UserError: as `load_hf`.
    """
    table, prefix = links(config), base_prefix(config)
    with ExitStack() as stack:
        stored = _open_files(Path(directory), stack)
        if table[0].theirs not in stored and table[0].theirs.removeprefix(prefix) in stored:
            # A bare backbone (the published GPT-2, for one) is saved without the prefix.
            stored = {name if name.startswith("lm_head.") else prefix + name: t for name, t in stored.items()}
        stored = {name: tensor for name, tensor in stored.items() if not is_buffer(name)}
        head = stored.pop("lm_head.weight", None) if config.tied else None
        _check_names({link.theirs: link.shape for link in table}, stored, str(directory))
        if head is not None and not torch.equal(head.read(), stored[table[0].theirs].read()):
            message = "true, but lm_head.weight differs from the embedding; set it to false"
            raise UserError(Problem("config.json tie_word_embeddings", message))
        for link in table:
            yield from link.to_ours(stored[link.theirs].read())


def read_hf_weights(directory: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and our parameters of a Hugging Face folder, each tensor in the file's own dtype.

    Raises:
        UserError: as `load_hf`.
    """
    config = model_config_from_hf(read_hf_config(directory))
    # Parts of a joined or transposed tensor are views of it; owning copies keep storages apart.
    return config, {name: _owned(tensor) for name, tensor in hf_weights(directory, config)}


def write_hf(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and safetensors that `AutoModelForCausalLM` loads; the folder appears whole or not at all.

    Args:
        directory: a new or empty folder.
        config: resolved model configuration.
        tensors: our parameter names to tensors, on any device, written in their own dtype.
        extra: further keys of config.json that do not describe the network, e.g. ``eos_token_id``.
        shard_bytes: largest file in bytes; above it there are several and an index.

    Raises:
        UserError: if the folder has contents, parameters are missing or misshapen, or no supported architecture
            expresses `config`.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another one for the export")
    table = links(config)
    _check_names({name: shape for link in table for name, shape in link.parts}, tensors, "the checkpoint")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_tensors(partial, table, tensors, shard_bytes)
    dtype = str(tensors["embed.weight"].dtype).removeprefix("torch.")
    _write_json(partial / "config.json", {**(extra or {}), **hf_config(config, dtype)})
    partial.replace(target)


@dataclass(frozen=True)
class _Stored:
    """A tensor in an open file, under the name that it has there."""

    handle: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.handle.get_tensor(self.name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a Hugging Face folder has config.json and *.safetensors") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _owned(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format) if tensor._is_view() else tensor


def _open_files(directory: Path, stack: ExitStack) -> dict[str, _Stored]:
    """The tensors of all safetensors files of the folder by name; files are mapped, not loaded."""
    if (directory / INDEX).exists():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{directory / INDEX} has no weight_map")
        files = sorted({str(file) for file in weight_map.values()})
    elif (directory / SINGLE).exists():
        files = [SINGLE]
    else:
        found = ", ".join(sorted(p.name for p in directory.glob("*.bin"))) or "none"
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX} (other weight files: {found})")
    if absent := [file for file in files if not (directory / file).exists()]:
        raise UserError(f"{directory / INDEX} lists {len(absent)} missing files: {_some(absent)}")
    stored: dict[str, _Stored] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(directory / file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{directory / file} is damaged or not safetensors: {error}") from None
        names: list[str] = handle.keys()
        stored |= {name: _Stored(handle, name) for name in names}
    return stored


def _check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Any], where: str) -> None:
    """Raise a UserError with everything missing, unexpected or misshapen in `found`."""
    problems: list[str] = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{where} lacks {len(missing)} tensors: {_some(missing)}")
    if unexpected := sorted(name for name in found if name not in expected):
        problems.append(f"{where} has {len(unexpected)} unexpected tensors: {_some(unexpected)}")
    for name, shape in expected.items():
        if name in found and tuple(found[name].shape) != shape:
            problems.append(f"{where}: {name} has shape {tuple(found[name].shape)}, the configuration says {shape}")
    if problems:
        raise UserError(*problems)


def _some(names: list[str]) -> str:
    rest = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _write_tensors(directory: Path, table: list[Link], tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Safetensors files of at most `shard_bytes` each (one tensor at least), with an index if there are several."""
    shards: list[list[Link]] = []
    sizes: list[int] = []
    for link in table:
        size = sum(tensors[name].nbytes for name, _ in link.parts)
        if not shards or sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(link)
        sizes[-1] += size
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
        content = {link.theirs: link.to_theirs(tensors).cpu() for link in shard}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    if count > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
