"""Hugging Face folders (config.json and safetensors) in and out, without transformers."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.schema import ModelConfig
from ...parallel.global_tensor import Placement
from ..transformer import Transformer
from .config_json import hf_config, is_buffer, is_fused, links, model_config_from_hf
from .families import find_family
from .files import INDEX, SINGLE, Notice, Stored, check_types, open_files, read_hf_config, some, to_stderr
from .links import Link

__all__ = [
    "HfFolder",
    "Notice",
    "hf_config",
    "hf_weights",
    "load_hf",
    "model_config_from_hf",
    "read_hf_config",
    "read_hf_weights",
    "to_stderr",
    "write_hf",
]

SHARD_BYTES = 5_000_000_000  # transformers' own default used to be 5 GB; hubs and readers cope with it

_WRAPPERS = ("", "module.", "_orig_mod.", "base_model.model.")
"""What DistributedDataParallel, torch.compile and PEFT put before every name."""


def load_hf(directory: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Transformer:
    """A Hugging Face folder as a module: `module(tokens (B, T)) -> logits (B, T, V)`.

    Args:
        directory: folder with config.json and *.safetensors, one file or shards with an index.
        dtype: type of the parameters; the file's values are cast.

    Raises:
        UserError: for an unsupported model, missing or unexpected tensors, or damaged files.
    """
    config = model_config_from_hf(read_hf_config(directory))
    module = Transformer(config).to(dtype)
    values = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in hf_weights(directory, config):
            values[name].copy_(tensor)
    return module


def hf_weights(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    where: Mapping[str, Placement] | None = None,
    notice: Notice = to_stderr,
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters and buffers (name, tensor in the file's dtype) one after another: only one has to be in memory.

    All names and shapes are checked before the first one; a tensor may be a view of a larger one.

    Args:
        directory: as of `load_hf`.
        config: its `model_config_from_hf`.
        where: which slices of which parameters to read, and nothing else; none: everything.
        notice: told about tensors that are passed over.

    Raises:
        UserError: as `load_hf`.
    """
    with HfFolder(directory, config, notice) as folder:
        for name, shape in folder.shapes.items():
            placement = Placement.whole(shape) if where is None else where.get(name)
            if placement is not None:
                yield name, folder.read(name, placement)


class HfFolder:
    """The weights of a Hugging Face folder under our names, read slice by slice; a context manager.

    Args:
        directory, config, notice: as of `hf_weights`.

    Raises:
        UserError: as `load_hf`.
    """

    def __init__(self, directory: str | os.PathLike[str], config: ModelConfig, notice: Notice = to_stderr) -> None:
        self._stack = ExitStack()
        try:
            self._open(Path(directory), config, notice)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, directory: Path, config: ModelConfig, notice: Notice) -> None:
        stored = open_files(directory, self._stack, notice)
        family = find_family(config.family)
        table = list(family.links(config, is_fused(config, stored)))
        expected = {name: shape for link in table for name, shape in link.theirs.items()}
        stored = _renamed(stored, expected, family.backbone, directory, notice)
        stored = {name: t for name, t in stored.items() if not is_buffer(name) and (name in expected or not t.alias)}
        if extra := {name: what for name in stored if (what := family.passed_over(config, name))}:
            what = " and ".join(sorted(set(extra.values())))
            notice(f"{directory}: {len(extra)} tensors of {what} are not read: {some(list(extra))}")
            stored = {name: tensor for name, tensor in stored.items() if name not in extra}
        if config.tied:
            _tie(stored, next(iter(table[0].theirs)))
        _check_names(expected, stored, str(directory))
        check_types(stored, str(directory))
        self._stored = stored
        self._links = {name: link for link in table for name in link.ours}
        self.shapes = {name: shape for link in table for name, shape in link.ours.items()}
        """Of our parameters and buffers, by name."""

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, placement: Placement) -> Tensor:
        """A slice of one of our parameters, in the file's dtype; may be a view of a larger tensor."""
        return self._links[name].to_ours(name, placement, lambda theirs, index: self._stored[theirs].part(index))


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
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and safetensors that `AutoModelForCausalLM` loads; the folder appears whole or not at all.

    Args:
        directory: a new or empty folder.
        config: resolved model configuration.
        tensors: our parameter names to tensors, on any device, written in their own dtype.
        extra: further keys of config.json that do not describe the network, e.g. `eos_token_id`.
        files: further files of the folder, by name, e.g. the tokenizer's.
        shard_bytes: largest file in bytes; above it there are several and an index.

    Raises:
        UserError: if the folder has contents, parameters are missing or misshapen, or no supported architecture
            expresses `config`.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another one for the export")
    table = links(config)
    _check_names({name: shape for link in table for name, shape in link.ours.items()}, tensors, "the checkpoint")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_tensors(partial, table, tensors, shard_bytes)
    dtype = str(tensors["embed.weight"].dtype).removeprefix("torch.")
    _write_json(partial / "config.json", {**(extra or {}), **hf_config(config, dtype)})
    for name, content in (files or {}).items():
        (partial / name).write_bytes(content)
    partial.replace(target)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _owned(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format) if tensor._is_view() else tensor


def _renamed(
    stored: Mapping[str, Stored], expected: Mapping[str, Any], prefix: str, directory: Path, notice: Notice
) -> dict[str, Stored]:
    """The tensors under the names of the whole model, which they may have without `prefix` (the bare backbone, as the
    published GPT-2) or behind that of a wrapper."""
    best, left_out, most = dict(stored), "", len(expected.keys() & stored.keys())
    for wrapper in _WRAPPERS:
        plain = {name.removeprefix(wrapper): tensor for name, tensor in stored.items()}
        bare = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in plain.items()}
        for names in (plain, bare):
            hits = len(expected.keys() & names.keys())
            if hits > most and len(names) == len(stored):
                best, left_out, most = names, wrapper, hits
    if left_out:
        notice(f"{directory}: the tensors' names begin with {left_out}, which is left out")
    return best


def _tie(stored: dict[str, Stored], embedding: str) -> None:
    """Leaves one tensor of an embedding and a head that share it, whichever of them the files have.

    Raises:
        UserError: if they have two different ones.
    """
    head = stored.pop("lm_head.weight", None)
    if head is None:
        return
    found = stored.setdefault(embedding, head)
    if found.name == head.name or (found.shape == head.shape and torch.equal(found.read(), head.read())):
        return
    message = "true, but lm_head.weight differs from the embedding; set it to false"
    raise UserError(Problem("config.json tie_word_embeddings", message))


def _check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Any], where: str) -> None:
    """Raise a UserError with everything missing, unexpected or misshapen in `found`."""
    problems: list[str] = []
    if missing := [name for name in expected if name not in found]:
        hint = "; if the head is the embedding, set tie_word_embeddings to true in config.json"
        hint = hint if missing == ["lm_head.weight"] else ""
        problems.append(f"{where} lacks {len(missing)} tensors: {some(missing)}{hint}")
    if unexpected := sorted(name for name in found if name not in expected):
        problems.append(f"{where} has {len(unexpected)} unexpected tensors: {some(unexpected)}")
    for name, shape in expected.items():
        if name in found and tuple(found[name].shape) != shape:
            problems.append(f"{where}: {name} has shape {tuple(found[name].shape)}, the configuration says {shape}")
    if problems:
        raise UserError(*problems)


def _write_tensors(directory: Path, table: list[Link], tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Safetensors files of at most `shard_bytes` each (one tensor at least), with an index if there are several."""
    shards: list[list[str]] = []
    sizes: list[int] = []
    sources: dict[str, Link] = {}
    for link in table:
        itemsize = tensors[next(iter(link.ours))].itemsize
        for name, shape in link.theirs.items():
            size = math.prod(shape) * itemsize
            if not shards or sizes[-1] + size > shard_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append(name)
            sizes[-1] += size
            sources[name] = link
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
        content: dict[str, Tensor] = {}
        wanted = set(shard)
        for link in dict.fromkeys(sources[name] for name in shard):
            content |= {name: tensor.cpu() for name, tensor in link.to_theirs(tensors) if name in wanted}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    if count > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
