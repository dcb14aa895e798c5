"""Llama 2 and 3."""

from __future__ import annotations

from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_attention_bias, read_decoder, read_heads, write_decoder
from ..expressible import DENSE, heads_divide_hidden, one_attention_bias, without_window
from ..reader import Reader
from ..windows import no_window
from .family import Family


def _read(reader: Reader) -> dict[str, Any]:
    return {
        **read_decoder(reader),
        **no_window(reader),
        **read_heads(reader),
        **read_attention_bias(reader),
        "ffn_bias": bool(reader.value("mlp_bias")),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(cfg),
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
        "mlp_bias": cfg.ffn_bias,
    }


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    absent={**LLAMA_LIKE, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    read=_read,
    write=_write,
    values=DENSE,
    checks=(one_attention_bias, heads_divide_hidden, without_window),
)
