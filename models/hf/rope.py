"""The rotary embedding of a config.json, both ways.

Both spellings are read and written: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...configs.resolve import yarn_scale
from ...configs.schema import RopeConfig
from .reader import Reader

_YARN_KEYS = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"}
_LLAMA3_KEYS = {"low_freq_factor", "high_freq_factor"}
_KEYS = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_NOTHING: Mapping[str, Any] = {}


def read_rope(reader: Reader, *, theta: float = 10000.0, absent: Mapping[str, Any] = _NOTHING) -> RopeConfig:
    """The rotary embedding.

    Args:
        reader: of config.json.
        theta: the base where no key says one.
        absent: what stands for an object that config.json leaves out.
    """
    rope = _object(reader, theta, absent)
    rope.only("rope_type", "default", "linear", "llama3", "yarn")
    rope.only("partial_rotary_factor", 1.0)
    kind = rope.value("rope_type")
    fields: dict[str, Any] = {"theta": float(rope.number("rope_theta"))}
    if kind in ("linear", "llama3", "yarn"):
        fields |= {"scaling": kind, "factor": float(rope.number("factor"))}
    if kind in ("llama3", "yarn"):
        fields["original_positions"] = rope.integer("original_max_position_embeddings")
    if kind == "llama3":
        fields |= {key: float(rope.number(key)) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= {
            "beta_fast": float(rope.value("beta_fast") or 32.0),
            "beta_slow": float(rope.value("beta_slow") or 1.0),
            "attention_factor": _yarn_attention_factor(rope, fields["factor"]),
            "truncate": bool(rope.value("truncate")),
        }
    return RopeConfig(**fields)


def _object(reader: Reader, theta: float, absent: Mapping[str, Any]) -> Reader:
    """The rotary embedding's own object in config.json."""
    source, given = _given(reader, absent)
    # transformers: an original length beside the rotary embedding's object wins over the one in it, and a missing one
    # is the present length; a missing theta is the outer one, else the family's.
    outer = reader.config.get("original_max_position_embeddings")
    max_positions = reader.integer("max_position_embeddings")
    defaults = {
        "rope_theta": reader.config.get("rope_theta") or theta,
        "original_max_position_embeddings": max_positions,
        "partial_rotary_factor": reader.config.get("partial_rotary_factor"),
        "rope_type": given.get("type", "default"),
        "truncate": True,
    }
    if outer is not None:
        given = {**given, "original_max_position_embeddings": outer}
    if given.get("rope_type", given.get("type")) == "yarn" and given.get("factor", 0) is None:
        original = Reader(given, defaults, f"{source}.", reader.problems).integer("original_max_position_embeddings")
        given = {**given, "factor": max_positions / original}
    rope = Reader(given, defaults, f"{source}.", reader.problems)
    for key in sorted(set(given) - _KEYS - _YARN_KEYS - _LLAMA3_KEYS):
        rope.problem(key, f"{given[key]!r} is not supported")
    return rope


def _given(reader: Reader, absent: Mapping[str, Any] = _NOTHING) -> tuple[str, Mapping[str, Any]]:
    """The key that the object stands under, and the object."""
    source = next((k for k in ("rope_scaling", "rope_parameters") if reader.config.get(k)), "rope_parameters")
    given = reader.config.get(source) or absent
    if not isinstance(given, Mapping):
        reader.problem(source, f"{given!r} is not an object")
        return source, {}
    return source, given


def _yarn_attention_factor(rope: Reader, factor: float) -> float:
    """Multiplier of cos and sin: given, or the quotient of two scales, or one."""
    if rope.value("attention_factor") is not None:
        return float(rope.number("attention_factor"))
    if rope.value("mscale") and rope.value("mscale_all_dim"):
        return yarn_scale(factor, rope.number("mscale")) / yarn_scale(factor, rope.number("mscale_all_dim"))
    return yarn_scale(factor)


def read_score_factor(reader: Reader, rope: RopeConfig) -> float:
    """The multiplier of attention scores that DeepSeek's model code takes from YaRN's `mscale_all_dim`."""
    source, given = _given(reader)
    if not given.get("mscale_all_dim") or rope.scaling == "none":
        return 1.0
    scale = Reader(given, {}, f"{source}.", reader.problems).number("mscale_all_dim")
    return yarn_scale(rope.factor, scale) ** 2


def write_rope(rope: RopeConfig, *, mscale: bool = False) -> dict[str, Any]:
    """The keys of config.json.

    Args:
        rope: the rotary embedding.
        mscale: the family's code takes `rope.score_factor` from YaRN's `mscale_all_dim`.
    """
    scaling = _scaling(rope, mscale)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})},
    }


def _scaling(rope: RopeConfig, mscale: bool) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    keys: tuple[str, ...] = ()
    if rope.scaling == "llama3":
        keys = ("low_freq_factor", "high_freq_factor")
    elif rope.scaling == "yarn":
        keys = ("beta_fast", "beta_slow", "attention_factor", "truncate")
    if keys:
        scaling["original_max_position_embeddings"] = rope.original_positions
    if mscale and rope.score_factor != 1.0:
        scaling |= _mscales(rope)
    return scaling | {key: getattr(rope, key) for key in keys if getattr(rope, key) is not None}


def _mscales(rope: RopeConfig) -> dict[str, float]:
    """DeepSeek's two numbers: that of the scores, and that whose scale over the other's is the attention factor."""

    def inverse(scale: float) -> float:
        exact = (scale - 1) / (0.1 * math.log(rope.factor))
        short = round(exact, 9)  # published values have three digits
        return short if math.isclose(yarn_scale(rope.factor, short), scale, rel_tol=1e-14) else exact

    scores = math.sqrt(rope.score_factor)
    return {"mscale_all_dim": inverse(scores), "mscale": inverse(rope.attention_factor * scores)}
