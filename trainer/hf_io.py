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
from ..configs.schema import MlaConfig, ModelConfig, MoeConfig, RopeConfig, RouterConfig
from ..models.hf import hf_weights, model_config_from_hf, read_hf_config, read_hf_weights, write_hf
from ..models.hf_names import links
from ..parallel.plan import Sharding
from .checkpoint import Checkpointer, read_full, write_full
from .checkpoint_files import read_state
from .setup import Parts
from .state import model_tensors

# Keys of config.json that tokenizers and generation need and that say nothing about the network.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")

# What may differ between a job and the weights that it starts from: names and training choices.
_FREE = {"preset", "family", "init_std", "dropout"}

# The keys of model.rope that each kind of scaling reads.
_ROPE = {
    "none": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_positions", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_positions", "beta_fast", "beta_slow", "attention_factor"},
}


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
        parts.load(_slices(hf_weights(path, given), parts.where))
        return
    try:
        verified = checkpointer.find_resume(path)
    except UserError as error:
        raise UserError(*(Problem("checkpoint.init", problem.message) for problem in error.problems)) from None
    assert verified is not None  # a named checkpoint is found or is an error
    check_same_model(model_config_from_state(read_state(verified)["model"]), parts.model.cfg, path)
    # Masters of a bf16 run are fp32, imported weights what their files held: any of them may start any run.
    checkpointer.load(verified, model_tensors(parts), prefix="model/", cast=True)
    parts.replicas.publish()


def check_same_model(given: ModelConfig, job: ModelConfig, path: Path) -> None:
    """Refuse weights of a network that computes something else than the job's.

    Raises:
        UserError: one problem per key that differs.
    """
    wanted, found = _computed(given), _computed(job)
    problems = [
        Problem(f"model.{key}", f"{found.get(key)}, but checkpoint.init={path} has {value}; set model.{key}={value}")
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if problems:
        raise UserError(*problems)


def model_config_from_state(model: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a checkpoint's ``state["model"]``."""
    moe = dict(model.get("moe", {}))
    moe["router"] = RouterConfig(**moe.get("router", {}))
    nested = {"rope": RopeConfig(**model["rope"]), "mla": MlaConfig(**model.get("mla", {})), "moe": MoeConfig(**moe)}
    return ModelConfig(**{**model, **nested})


def _slices(weights: Iterator[tuple[str, Tensor]], where: Mapping[str, Sharding]) -> Iterator[tuple[str, Tensor]]:
    """This rank's slice of each whole parameter; buffers are whole everywhere."""
    for name, whole in weights:
        yield name, where[name].placement.of(whole) if name in where else whole


def _computed(config: ModelConfig) -> dict[str, Any]:
    """The keys that decide what the network computes."""
    rotary = config.position == "rope"
    plain = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE and key != "rope"}
    if rotary:
        del plain["max_positions"]  # only a recorded length
    rope = {"theta", "scaling", *_ROPE[config.rope.scaling]} if rotary else set[str]()
    if config.rope.attention_factor is None:
        rope.discard("attention_factor")
    return plain | {f"rope.{key}": getattr(config.rope, key) for key in sorted(rope)}
