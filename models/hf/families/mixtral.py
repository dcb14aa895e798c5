"""Mixtral: Mistral's layer with experts in all layers; a softmax over the selected logits."""

from __future__ import annotations

from functools import partial
from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_decoder, read_heads, refuse_attention_bias, write_decoder
from ..expressible import ROUTED, TRUE, each, experts_everywhere, window_everywhere, with_experts
from ..moe import read_moe, read_router, write_moe
from ..names import ExpertNames, decoder_links, expert_links
from ..reader import Reader
from ..windows import read_window
from .family import Family

_NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")


def _read(reader: Reader) -> dict[str, Any]:
    slides = reader.value("sliding_window") is not None
    fields = read_decoder(reader, theta=1e6)
    return {
        **refuse_attention_bias(reader, FAMILY.architecture),
        **fields,
        **read_window(reader, lambda layer: slides, listed=False),
        **read_heads(reader),
        **read_moe(reader, width=fields["ffn"], router=read_router(reader, normalize=True)),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(cfg),
        **write_moe(cfg, "num_local_experts"),
        "intermediate_size": cfg.moe.ffn,
        "head_dim": cfg.head_dim,
        "sliding_window": cfg.window,
    }


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    absent={
        **LLAMA_LIKE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    read=_read,
    write=_write,
    links=partial(decoder_links, experts=partial(expert_links, names=_NAMES)),
    values={**ROUTED, **each("moe.router.normalize", TRUE)},
    checks=(window_everywhere, with_experts, experts_everywhere),
)
