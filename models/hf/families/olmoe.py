"""OLMoE: Llama's layer with an RMSNorm over all query and all key heads, and experts in all layers."""

from __future__ import annotations

from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_attention_bias, read_decoder, read_heads, write_decoder
from ..expressible import (
    BOTH,
    ROUTED,
    TRUE,
    each,
    experts_everywhere,
    heads_fill_hidden,
    one_attention_bias,
    with_experts,
    without_window,
)
from ..moe import read_moe, read_router, write_moe
from ..reader import Reader
from ..windows import no_window
from .family import Family


def _read(reader: Reader) -> dict[str, Any]:
    reader.only("clip_qkv")
    fields = read_decoder(reader)
    return {
        **fields,
        **no_window(reader),
        **read_heads(reader),
        **read_attention_bias(reader),
        "qk_norm": True,
        "qk_norm_whole": True,
        **read_moe(reader, width=fields["ffn"], router=read_router(reader)),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(cfg),
        **write_moe(cfg, "num_experts"),
        "intermediate_size": cfg.moe.ffn,
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
        "norm_topk_prob": cfg.moe.router.normalize,
    }


FAMILY = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    absent={
        **LLAMA_LIKE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "norm_topk_prob": False,
    },
    read=_read,
    write=_write,
    values={**ROUTED, **each("qk_norm qk_norm_whole", TRUE), **each("qkv_bias out_bias", BOTH)},
    checks=(one_attention_bias, heads_fill_hidden, without_window, with_experts, experts_everywhere),
)
