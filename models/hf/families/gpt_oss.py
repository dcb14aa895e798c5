"""GPT-OSS: attention sinks, a window in every other layer, biases everywhere, clipped SwiGLU, experts in all layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ....configs.schema import ModelConfig
from ..decoder import LLAMA_LIKE, read_attention_bias, read_decoder, read_heads, write_decoder
from ..expressible import BOTH, ROUTED, TRUE, each, experts_everywhere, one_attention_bias, with_experts
from ..links import Joined, Link
from ..moe import read_moe, read_router, write_moe
from ..names import decoder_links, one, router_links
from ..reader import Reader
from ..windows import attention_kinds, read_window
from .family import Family

_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
_ALPHA, _LIMIT = 1.702, 7.0
"""Of the clipped SwiGLU, as the model's code has them."""


def _read(reader: Reader) -> dict[str, Any]:
    reader.only("swiglu_alpha", _ALPHA)
    reader.only("swiglu_limit", _LIMIT)
    fields = read_decoder(reader, theta=150000.0, rope=_ROPE)
    return {
        **fields,
        "activation": "swiglu_clipped",
        **read_window(reader, lambda layer: layer % 2 == 0),
        **read_heads(reader),
        **read_attention_bias(reader),
        "sinks": True,
        **read_moe(reader, width=fields["ffn"], bias=True, router=read_router(reader, normalize=True, logit_bias=True)),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(cfg),
        **write_moe(cfg, "num_local_experts"),
        "intermediate_size": cfg.moe.ffn,
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
        "sliding_window": cfg.window,
        "layer_types": attention_kinds(cfg),
        "swiglu_alpha": _ALPHA,
        "swiglu_limit": _LIMIT,
    }


def _experts(cfg: ModelConfig, layer: str, ours: str, fused: bool) -> Iterator[Link]:
    """(in, out) weights of all experts together, rows of gate and up in turn."""
    experts, hidden, width = cfg.moe.experts, cfg.hidden, cfg.moe.ffn
    yield from router_links(cfg, f"{layer}.mlp.router", ours)
    theirs = f"{layer}.mlp.experts"
    pair = [f"{ours}.experts.{part}" for part in ("gate", "up")]
    weights = tuple((f"{name}.weight", (experts, width, hidden)) for name in pair)
    biases = tuple((f"{name}.bias", (experts, width)) for name in pair)
    down = ((f"{ours}.experts.down.weight", (experts, hidden, width)),)
    yield Joined(f"{theirs}.gate_up_proj", weights, transposed=True, dim=1, interleaved=True)
    yield Joined(f"{theirs}.gate_up_proj_bias", biases, dim=1, interleaved=True)
    yield Joined(f"{theirs}.down_proj", down, transposed=True)
    yield one(f"{theirs}.down_proj_bias", f"{ours}.experts.down.bias", (experts, hidden))


FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    absent={
        **LLAMA_LIKE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_alpha": _ALPHA,
        "swiglu_limit": _LIMIT,
    },
    read=_read,
    write=_write,
    links=partial(decoder_links, experts=_experts),
    values={
        **ROUTED,
        **each("activation", ("swiglu_clipped",)),
        **each("qkv_bias out_bias ffn_bias", BOTH),
        **each("sinks moe.bias moe.router.logit_bias moe.router.normalize", TRUE),
    },
    checks=(one_attention_bias, with_experts, experts_everywhere),
)
