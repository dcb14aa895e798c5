"""Qwen 2 and 2.5: Llama's layer with biases on query, key and value; a window in the last layers, or by a list."""

from __future__ import annotations

from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_decoder, read_heads, refuse_attention_bias, write_decoder
from ..expressible import DENSE, FALSE, TRUE, each
from ..reader import Reader
from ..windows import read_switched_window, write_switched_window
from .family import Family


def _read(reader: Reader) -> dict[str, Any]:
    return {
        **refuse_attention_bias(reader, FAMILY.architecture),
        **read_decoder(reader),
        **read_switched_window(reader, lambda layer, border: layer >= border),
        **read_heads(reader),
        "qkv_bias": True,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(cfg), "head_dim": cfg.head_dim, **write_switched_window(cfg)}


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    absent={
        **LLAMA_LIKE,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
    },
    read=_read,
    write=_write,
    values={**DENSE, **each("qkv_bias", TRUE), **each("out_bias ffn_bias", FALSE)},
)
