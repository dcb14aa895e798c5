"""Qwen 2 MoE: Qwen 2's layer with experts and a gated shared one."""

from __future__ import annotations

from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_decoder, read_heads, refuse_attention_bias, write_decoder
from ..expressible import BOTH, ROUTED, TRUE, each, with_experts, with_shared_expert
from ..moe import read_moe, read_router, read_sparse_layers, write_moe, write_sparse_layers
from ..reader import Reader
from ..windows import read_switched_window, write_switched_window
from .family import Family


def _read(reader: Reader) -> dict[str, Any]:
    return {
        **refuse_attention_bias(reader, FAMILY.architecture),
        **read_decoder(reader),
        **read_switched_window(reader, lambda layer, border: layer % 2 == 0 and layer < border),
        **read_heads(reader),
        "qkv_bias": bool(reader.value("qkv_bias")),
        **read_moe(
            reader,
            width=reader.integer("moe_intermediate_size"),
            router=read_router(reader),
            shared=reader.integer("shared_expert_intermediate_size"),
            shared_gate=True,
            **read_sparse_layers(reader),
        ),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(cfg),
        **write_switched_window(cfg),
        **write_moe(cfg, "num_experts"),
        **write_sparse_layers(cfg),
        "head_dim": cfg.head_dim,
        "qkv_bias": cfg.qkv_bias,
        "moe_intermediate_size": cfg.moe.ffn,
        "norm_topk_prob": cfg.moe.router.normalize,
        "shared_expert_intermediate_size": cfg.moe.shared,
    }


FAMILY = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    absent={
        **LLAMA_LIKE,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "max_window_layers": 28,
        "num_key_value_heads": 16,
        "qkv_bias": True,
    },
    read=_read,
    write=_write,
    values={
        **{key: allowed for key, allowed in ROUTED.items() if key != "moe.shared"},
        **each("qkv_bias", BOTH),
        **each("moe.shared_gate", TRUE),
    },
    checks=(with_experts, with_shared_expert),
)
