"""Hugging Face's config.json to ModelConfig and back, and the tensors that belong to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...configs.errors import UserError
from ...configs.resolve import resolve_model
from ...configs.schema import ModelConfig
from .families import family_of, hf_family
from .links import Link

# Buffers that older checkpoints carry: constants that the model recomputes.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|(^|\.)attn\.(masked_)?bias)$")
_FUSED = ".mlp.experts.gate_up_proj"


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The resolved ModelConfig of a config.json. Dropout is left at 0: it belongs to a job, not to the weights.

    Args:
        config: the parsed config.json.

    Raises:
        UserError: naming every key whose value the model cannot express.
    """
    family = family_of(config)
    reader = family.reader(config)
    reader.only("quantization_config")
    fields = family.read(reader)
    tied = bool(reader.value("tie_word_embeddings"))
    given = reader.value("initializer_range") is not None
    init_std = float(reader.number("initializer_range", zero=True)) if given else ModelConfig.init_std
    if reader.problems:
        raise UserError(*reader.problems)
    model = ModelConfig(family=family.name, tied=tied, init_std=init_std, **fields)
    return resolve_model(model, model.max_positions or 1)


def hf_config(cfg: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of an export.

    Args:
        cfg: resolved model configuration.
        dtype: torch's name of the weights' type, e.g. `bfloat16`.

    Raises:
        UserError: if no supported architecture expresses `cfg`.
    """
    family = hf_family(cfg)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type or family.name,
        "vocab_size": cfg.vocab,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
        "dtype": dtype,
        "torch_dtype": dtype,
        **family.write(cfg),
    }


def links(cfg: ModelConfig, *, fused: bool = False) -> list[Link]:
    """Every tensor of the Hugging Face model that expresses `cfg`.

    Args:
        cfg: resolved model configuration.
        fused: the experts of a layer are in one tensor per matrix, as transformers 5 holds them in memory, and not in
            one per expert, as checkpoints are published.

    Raises:
        UserError: if no supported architecture expresses `cfg`.
    """
    return list(hf_family(cfg).links(cfg, fused))


def is_fused(cfg: ModelConfig, names: Mapping[str, object]) -> bool:
    """Whether a folder with tensors of these names holds the experts of a layer together."""
    return bool(cfg.moe.experts) and any(name.endswith(_FUSED) for name in names)


def is_buffer(name: str) -> bool:
    """Whether a Hugging Face tensor is a constant that is not read."""
    return bool(_BUFFERS.search(name))
