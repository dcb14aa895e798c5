"""Qwen 3: Llama's layer with an RMSNorm of every query and key head; a window as in Qwen 2."""

from __future__ import annotations

from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_attention_bias, read_decoder, read_heads, write_decoder
from ..expressible import DENSE, FALSE, TRUE, each, one_attention_bias
from ..reader import Reader
from ..windows import read_switched_window, write_switched_window
from .family import Family


def _read(reader: Reader) -> dict[str, Any]:
    return {
        **read_decoder(reader),
        **read_switched_window(reader, lambda layer, border: layer >= border),
        **read_heads(reader),
        **read_attention_bias(reader),
        "qk_norm": True,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(cfg),
        **write_switched_window(cfg),
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
    }


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    absent={
        **LLAMA_LIKE,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "attention_bias": False,
        "head_dim": 128,
    },
    read=_read,
    write=_write,
    values={**DENSE, **each("qk_norm", TRUE), **each("ffn_bias", FALSE)},
    checks=(one_attention_bias,),
)
