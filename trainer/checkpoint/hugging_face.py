"""Hugging Face folders to Pentad checkpoints and back, and the weights that a run starts from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...configs.schema import ModelConfig, MoeConfig
from ...configs.tables.imports import imported
from ...models.hf.folder import (
    HfFolder,
    Notice,
    model_config_from_hf,
    read_hf_config,
    read_hf_weights,
    to_stderr,
    write_hf,
)
from ...models.transformer import Transformer
from ...models.weights.upcycle import Read, check_upcycling, upcycled, upcycled_config
from ...models.weights.vocab_padding import padded_read, without_padding
from ...parallel.global_tensor import Placement
from ..setup import Parts
from ..text.model_source import find_checkpoint, read_model
from ..text.tokenizer_files import of_checkpoint, of_folder
from .checkpointer import Checkpointer, write_full
from .manifest import read_state
from .saved_model import check_same_model, model_config_from_state
from .slices import CheckpointSlices
from .state import model_tensors

_REMEMBERED = ".router.load"


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """What is made of a dense model; see `models.weights.upcycle.upcycled_config`."""

    experts: int
    top_k: int
    granularity: int = 1


def import_hf(
    directory: str | os.PathLike[str], out: str | os.PathLike[str], upcycle: Upcycle | None = None
) -> ModelConfig:
    """Write the weights of a Hugging Face folder as a checkpoint at step 0, each tensor in its own dtype.

    Args:
        directory: the folder.
        out: the checkpoint.
        upcycle: a mixture of experts is made of the dense model that the folder holds.

    Returns:
        The model configuration that was found, or made.

    Raises:
        UserError: for an unsupported model, missing or unexpected tensors, or damaged files.
    """
    if upcycle is None:
        config, tensors = read_hf_weights(directory)
    else:
        config, tensors = _upcycled_weights(directory, upcycle)
    tokenizer = of_folder(directory, read_hf_config(directory))
    state = {"step": 0, "model": dataclasses.asdict(config), "tokenizer": tokenizer.state}
    state |= {"imports": list(imported())} if imported() else {}
    write_full(Path(out), {f"model/{name}": tensor for name, tensor in tensors.items()}, state, tokenizer.files)
    return config


def _upcycled_weights(directory: str | os.PathLike[str], upcycle: Upcycle) -> tuple[ModelConfig, dict[str, Tensor]]:
    """All new tensors have the dtype of the embedding."""
    dense = model_config_from_hf(read_hf_config(directory))
    config = upcycled_config(dense, **dataclasses.asdict(upcycle))
    tensors: dict[str, Tensor] = {}
    with HfFolder(directory, dense) as folder:
        for name, shape in _shapes(config).items():
            made = upcycled(name, Placement.whole(shape), config, upcycle.granularity, folder.read, seed=0)
            tensors[name] = made.to(tensors["embed.weight"].dtype) if ".moe." in name else made
    return config, tensors


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of a model's parameters."""
    with torch.device("meta"):
        return {name: tuple(param.shape) for name, param in Transformer(config).named_parameters()}


def export_hf(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    notice: Notice = to_stderr,
) -> ModelConfig:
    """Write a model as a Hugging Face folder that `AutoModelForCausalLM` and, where the tokenizer is known,
    `AutoTokenizer` load.

    Args:
        source: folder of one checkpoint, or of a run, whose newest good checkpoint is taken.
        out: a new or empty folder.
        dtype: type of the written tensors; none: as in the checkpoint, which holds masters in full precision.
        notice: told if the tokenizer is not known.

    Returns:
        The model configuration of the checkpoint.

    Raises:
        UserError: for a damaged checkpoint, a model that no supported architecture expresses, or a folder in the way.
    """
    checkpoint = find_checkpoint(Path(source).expanduser(), notice)
    config, weights = read_model(checkpoint)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    tokenizer = of_checkpoint(checkpoint)
    write_hf(out, *without_padding(config, weights), extra=tokenizer.ids, files=tokenizer.exported())
    if tokenizer.kind == "none":
        notice(f"{checkpoint} knows no tokenizer; copy its files into {out}")
    return config


def load_initial(
    path: Path,
    parts: Parts,
    checkpointer: Checkpointer,
    *,
    upcycle: bool = False,
    seed: int = 0,
    notice: Notice = to_stderr,
) -> None:
    """Give a run its first weights (`checkpoint.init`), from a Hugging Face folder or a checkpoint of any layout.

    Args:
        path: the folder or checkpoint.
        parts: what is loaded into; each rank reads its slices only.
        checkpointer: verifies and reads checkpoints.
        upcycle: `path` holds a dense model of which the job's experts are made.
        seed: of the routers' rows, if `upcycle`.
        notice: told about tensors that are passed over.

    Raises:
        UserError: if `path` is neither, is damaged, or holds another model than the job's.
    """
    if (path / "config.json").exists():
        given = model_config_from_hf(read_hf_config(path))
        granularity = _check_initial(given, parts, path, upcycle)
        with HfFolder(path, given, notice) as folder:
            if upcycle:
                parts.load(_upcycled(parts, granularity, padded_read(folder.read, given), seed))
            else:
                parts.load(_read_all(parts, padded_read(folder.read, given), folder.shapes))
        return
    verified = checkpointer.verified(path, "checkpoint.init")
    given = model_config_from_state(read_state(verified))
    granularity = _check_initial(given, parts, path, upcycle)
    if upcycle:
        read = padded_read(CheckpointSlices(verified, _shapes(given)).read, given)
        parts.load(_upcycled(parts, granularity, read, seed))
        return
    if given.vocab != parts.model.cfg.vocab:
        shapes = _shapes(given)
        read = padded_read(CheckpointSlices(verified, shapes).read, given)
        parts.load(_read_all(parts, read, [*shapes, *_buffers(parts)]))
        return
    # What the balancing loss remembers of the last step belongs to a run, not to the weights.
    tensors = {name: tensor for name, tensor in model_tensors(parts).items() if not name.endswith(_REMEMBERED)}
    # Masters of a bf16 run are fp32, imported weights what their files held: any of them may start any run.
    checkpointer.load(verified, tensors, prefix="model/", cast=True, left=_REMEMBERED)
    parts.replicas.sync_params()


def _check_initial(given: ModelConfig, parts: Parts, path: Path, upcycle: bool) -> int:
    """The granularity of the experts that are made, if any."""
    if upcycle:
        return _check_upcycling(given, parts.model.cfg, path)
    check_same_model(given, parts.model.cfg, path)
    return 1


def _buffers(parts: Parts) -> dict[str, Placement]:
    """Those that belong to the weights."""
    buffers = {name: buffer for name, buffer in parts.buffers.items() if not name.endswith(_REMEMBERED)}
    return {name: Placement.whole(tuple(buffer.shape)) for name, buffer in buffers.items()}


def _read_all(parts: Parts, read: Read, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """This rank's slices of those of `names` that it holds."""
    where = {name: sharding.placement for name, sharding in parts.where.items()} | _buffers(parts)
    return ((name, read(name, where[name])) for name in names if name in where)


def _upcycled(parts: Parts, granularity: int, read: Read, seed: int) -> Iterator[tuple[str, Tensor]]:
    for name, sharding in parts.where.items():
        yield name, upcycled(name, sharding.placement, parts.model.cfg, granularity, read, seed)


def _check_upcycling(given: ModelConfig, job: ModelConfig, path: Path) -> int:
    if not given.moe.experts:
        check_same_model(given, dataclasses.replace(job, moe=MoeConfig()), path)
    return check_upcycling(given, job)
