"""Which keys of a model's configuration decide what it computes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .schema import ModelConfig

# Names, and choices of a job that leave the function of the weights alone.
_FREE = {
    "preset",
    "family",
    "init_std",
    "dropout",
    "mtp_loss",
    "linear.chunk",
    "moe.dispatcher",
    "moe.capacity_factor",
    "moe.capacity_scope",
    "moe.drop",
    "moe.pad",
    "moe.weigh",
    "moe.compute",
    "moe.overlap_chunks",
    "moe.router.bias_rate",
    "moe.router.jitter",
    "moe.router.aux_loss",
    "moe.router.aux_level",
    "moe.router.z_loss",
}

# The keys of model.rope that each kind of scaling reads.
_ROPE = {
    "none": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "original_positions", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_positions", "beta_fast", "beta_slow", "attention_factor", "truncate"},
}


def differences(one: ModelConfig, other: ModelConfig, *, padded: bool = False) -> dict[str, tuple[Any, Any]]:
    """The keys (`moe.router.scale`) that decide what a model computes and in which two differ, with both values.

    Keys whose values mean nothing in either model are left out.

    Args:
        one, other: resolved.
        padded: vocabularies are the same that have the same ids in use, whatever padding they have.
    """
    values = [_flat(dataclasses.asdict(config)) for config in (one, other)]
    for config, flat in zip((one, other), values, strict=True):
        flat["vocab_used"] = config.used_vocab
        if padded:
            flat["vocab"] = flat.pop("vocab_used")
        if flat["rope.attention_factor"] is None:  # not resolved: made by hand, or from an older checkpoint
            flat["rope.attention_factor"] = 0.1 * math.log(max(1.0, flat["rope.factor"])) + 1
    unused = _FREE | (_unused(one) & _unused(other))
    if one.moe_layers == other.moe_layers:
        unused |= {"moe.every", "moe.dense_layers"}
    pairs = {key: (value, values[1][key]) for key, value in values[0].items() if key not in unused}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def _unused(config: ModelConfig) -> set[str]:
    return _unused_rope(config) | _unused_attention(config) | _unused_moe(config)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unused_rope(config: ModelConfig) -> set[str]:
    every = {f"rope.{field.name}" for field in dataclasses.fields(config.rope)}
    if config.position != "rope":
        return every
    used = {"theta", "scaling", "score_factor", "interleaved", *_ROPE[config.rope.scaling]}
    return {"max_positions"} | every - {f"rope.{key}" for key in used}  # the positions are only a recorded length


def _unused_attention(config: ModelConfig) -> set[str]:
    unused: set[str] = set()
    if config.window is None:
        unused.add("window_every")
    if not config.qk_norm:
        unused.add("qk_norm_whole")
    if config.attention_every == 1:
        unused |= {f"linear.{field.name}" for field in dataclasses.fields(config.linear)}
    if not config.mla.kv_rank:
        unused |= {"mla.q_rank", "mla.nope_dim", "mla.rope_dim", "mla.value_dim"}
    return unused


def _unused_moe(config: ModelConfig) -> set[str]:
    moe = config.moe
    if not moe.experts:
        return {f"moe.{key}" for key in _flat(dataclasses.asdict(moe)) if key != "experts"}
    unused: set[str] = set()
    if len(config.moe_layers) == config.layers:
        unused.add("ffn")
    if not moe.shared:
        unused.add("moe.shared_gate")
    if moe.router.groups == 1:
        unused |= {"moe.router.groups_kept", "moe.router.group_members"}
    return unused
