"""The parts of config.json that decoders after Llama's model share, both ways; no family is named here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...configs.schema import ModelConfig
from .reader import Reader
from .rope import read_rope, write_rope

LLAMA_LIKE: Mapping[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
"""What transformers assumes for keys that config.json leaves out."""


def read_decoder(reader: Reader, *, theta: float = 10000.0, rope: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Sizes, norm and rotary embedding, without heads and biases.

    Args:
        reader: of config.json.
        theta, rope: base and object of the rotary embedding that a config.json without them means.
    """
    reader.only("hidden_act", "silu", "swish")
    return {
        "layers": reader.integer("num_hidden_layers"),
        "hidden": reader.integer("hidden_size"),
        "heads": reader.integer("num_attention_heads"),
        "ffn": reader.integer("intermediate_size"),
        "vocab": reader.integer("vocab_size"),
        "norm": "rms",
        "norm_eps": float(reader.number("rms_norm_eps")),
        "position": "rope",
        "max_positions": reader.integer("max_position_embeddings"),
        "rope": read_rope(reader, theta=theta, absent=rope or {}),
        "activation": "swiglu",
    }


def read_heads(reader: Reader) -> dict[str, Any]:
    """Key heads and the width of a head."""
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    kv_heads = heads if reader.value("num_key_value_heads") is None else reader.integer("num_key_value_heads")
    if heads % kv_heads:
        reader.problem("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if reader.value("head_dim") is None and hidden % heads:
        reader.problem("num_attention_heads", f"{heads} does not divide hidden_size {hidden}, and head_dim is absent")
    head_dim = hidden // heads if reader.value("head_dim") is None else reader.integer("head_dim")
    if head_dim % 2:
        reader.problem("head_dim", f"{head_dim} is odd; the rotary embedding needs pairs")
    return {"kv_heads": kv_heads, "head_dim": head_dim}


def read_attention_bias(reader: Reader) -> dict[str, Any]:
    """One key for the biases of all four projections."""
    bias = bool(reader.value("attention_bias"))
    return {"qkv_bias": bias, "out_bias": bias}


def refuse_attention_bias(reader: Reader, architecture: str) -> dict[str, Any]:
    """For architectures whose code does not read the key: a file that has it comes from other code, whose maths is not
    known here."""
    if reader.value("attention_bias"):
        reader.problem("attention_bias", f"True is not supported in {architecture}")
    return {}


def write_decoder(cfg: ModelConfig, *, mscale: bool = False) -> dict[str, Any]:
    """What `read_decoder` reads, and the number of key heads; `mscale` as of `write_rope`."""
    return {
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "attention_dropout": 0.0,
        **write_rope(cfg.rope, mscale=mscale),
    }
