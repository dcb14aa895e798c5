"""Hugging Face folders to Pentad checkpoints and back, and the weights that a run starts from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs.errors import Problem, UserError
from ..configs.schema import ModelConfig, RopeConfig
from ..models.hf import hf_weights, model_config_from_hf, read_hf_config, read_hf_weights, write_hf
from ..models.hf_names import links
from ..parallel.plan import Sharding
from .checkpoint import Checkpointer, read_full, write_full
from .setup import Parts
from .state import model_tensors

# Keys of config.json that tokenizers and generation need and that say nothing about the network.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")

# What may differ between a job and the weights that it starts from: names, training choices, recorded lengths.
_FREE = ("preset", "family", "init_std", "dropout")


def import_hf(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> ModelConfig:
    """Write the weights of a Hugging Face folder as a checkpoint at step 0, each tensor in its own dtype.

    Returns:
        The model configuration that was found.

    Raises:
        UserError: for an unsupported model, missing or unexpected tensors, or damaged files.
    """
    config, tensors = read_hf_weights(directory)
    given = read_hf_config(directory)
    state = {
        "step": 0,
        "model": dataclasses.asdict(config),
        "hf": {key: given[key] for key in _KEPT if key in given},
    }
    write_full(Path(out), {f"model/{name}": tensor for name, tensor in tensors.items()}, state)
    return config


def export_hf(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> ModelConfig:
    """Write a checkpoint's model as a Hugging Face folder that `AutoModelForCausalLM` loads.

    Args:
        checkpoint: folder of one checkpoint.
        out: a new or empty folder.
        dtype: type of the written tensors; none: as in the checkpoint, which holds masters in full precision.

    Returns:
        The model configuration of the checkpoint.

    Raises:
        UserError: for a damaged checkpoint, a model that no supported architecture expresses, or a folder in the way.
    """
    _, state = read_full(Path(checkpoint), [])
    config = model_config_from_state(state["model"])
    names = [name for link in links(config) for name, _ in link.parts]
    tensors, _ = read_full(Path(checkpoint), [f"model/{name}" for name in names])
    weights = {name: tensors[f"model/{name}"] for name in names}
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    write_hf(out, config, weights, extra=state.get("hf"))
    return config


def load_initial(path: Path, parts: Parts, checkpointer: Checkpointer) -> None:
    """Give a run its first weights (`checkpoint.init`), from a Hugging Face folder or a checkpoint of any layout.

    Raises:
        UserError: if `path` is neither, is damaged, or holds another model than the job's.
    """
    if (path / "config.json").exists():
        given = model_config_from_hf(read_hf_config(path))
        check_same_model(given, parts.model.cfg, path)
        parts.replicas.load(_slices(hf_weights(path, given), parts.where))
        return
    state = checkpointer.load(path, model_tensors(parts.replicas))
    check_same_model(model_config_from_state(state["model"]), parts.model.cfg, path)
    parts.replicas.publish()


def check_same_model(given: ModelConfig, job: ModelConfig, path: Path) -> None:
    """Refuse weights of a network that computes something else than the job's.

    Raises:
        UserError: one problem per key that differs.
    """
    free = _FREE if job.position == "learned" else (*_FREE, "max_positions", "rope.original_positions")
    if given.position == job.position == "learned":
        free = (*free, "rope")
    wanted, found = _flat(dataclasses.asdict(given)), _flat(dataclasses.asdict(job))
    problems = [
        Problem(f"model.{key}", f"{found[key]}, but checkpoint.init={path} has {value}; set model.{key}={value}")
        for key, value in wanted.items()
        if found[key] != value and key not in free and key.split(".")[0] not in free
    ]
    if problems:
        raise UserError(*problems)


def model_config_from_state(model: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a checkpoint's ``state["model"]``."""
    return ModelConfig(**{**model, "rope": RopeConfig(**model["rope"])})


def _slices(weights: Iterator[tuple[str, Tensor]], where: Mapping[str, Sharding]) -> Iterator[tuple[str, Tensor]]:
    """This rank's slice of each whole tensor."""
    for name, whole in weights:
        placement = where[name].placement
        if placement.dim is not None:
            whole = whole.narrow(placement.dim, placement.start, placement.stop - placement.start)
        yield name, whole


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat
