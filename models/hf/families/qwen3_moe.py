"""Qwen 3 MoE: Qwen 3's layer with experts."""

from __future__ import annotations

from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_attention_bias, read_decoder, read_heads, write_decoder
from ..expressible import BOTH, ROUTED, TRUE, each, one_attention_bias, window_everywhere, with_experts
from ..moe import read_moe, read_router, read_sparse_layers, write_moe, write_sparse_layers
from ..reader import Reader
from ..windows import read_window
from .family import Family


def _read(reader: Reader) -> dict[str, Any]:
    slides = bool(reader.value("use_sliding_window"))
    return {
        **read_decoder(reader),
        **read_window(reader, lambda layer: slides, listed=False),
        **read_heads(reader),
        **read_attention_bias(reader),
        "qk_norm": True,
        **read_moe(
            reader,
            width=reader.integer("moe_intermediate_size"),
            router=read_router(reader),
            **read_sparse_layers(reader),
        ),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(cfg),
        **write_moe(cfg, "num_experts"),
        **write_sparse_layers(cfg),
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
        "use_sliding_window": cfg.window is not None,
        "sliding_window": cfg.window,
        "moe_intermediate_size": cfg.moe.ffn,
        "norm_topk_prob": cfg.moe.router.normalize,
    }


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    absent={
        **LLAMA_LIKE,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
        "attention_bias": False,
    },
    read=_read,
    write=_write,
    values={**ROUTED, **each("qk_norm", TRUE), **each("qkv_bias out_bias", BOTH)},
    checks=(one_attention_bias, window_everywhere, with_experts),
)
