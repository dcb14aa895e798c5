"""Mistral: Llama's layer, with a sliding window in all layers or none."""

from __future__ import annotations

from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_decoder, read_heads, refuse_attention_bias, write_decoder
from ..expressible import DENSE, FALSE, each, window_everywhere
from ..reader import Reader
from ..windows import read_window
from .family import Family


def _read(reader: Reader) -> dict[str, Any]:
    slides = reader.value("sliding_window") is not None
    return {
        **refuse_attention_bias(reader, FAMILY.architecture),
        **read_decoder(reader),
        **read_window(reader, lambda layer: slides),
        **read_heads(reader),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(cfg), "head_dim": cfg.head_dim, "sliding_window": cfg.window}


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    absent={**LLAMA_LIKE, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    read=_read,
    write=_write,
    values={**DENSE, **each("qkv_bias out_bias ffn_bias", FALSE)},
    checks=(window_everywhere,),
)
