"""DeepSeek V2: latent attention, shared experts, dense first layers; softmax scores."""

from __future__ import annotations

from functools import partial
from typing import Any

from ....configs.schema import ModelConfig
from ..expressible import BOTH, FALSE, TRUE, each, heads_divide_hidden
from ..latent import LATENT, LATENT_ABSENT, latent_checks, read_latent_decoder, read_latent_moe, write_latent
from ..names import ExpertNames, decoder_links, expert_links
from ..reader import Reader
from .family import Family

_GROUP_MEMBERS = 1


def _read(reader: Reader) -> dict[str, Any]:
    reader.only("norm_topk_prob", False)
    reader.only("scoring_func", "softmax")
    reader.only("topk_method", "greedy", "group_limited_greedy")
    grouped = reader.value("topk_method") == "group_limited_greedy"
    return {
        **read_latent_decoder(reader, FAMILY.architecture, interleaved=True),
        "ffn_bias": bool(reader.value("mlp_bias")),
        **read_latent_moe(reader, grouped=grouped, group_members=_GROUP_MEMBERS),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    method = "group_limited_greedy" if cfg.moe.router.groups > 1 else "greedy"
    return {**write_latent(cfg, method), "mlp_bias": cfg.ffn_bias}


FAMILY = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    absent={
        **LATENT_ABSENT,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
    },
    read=_read,
    write=_write,
    links=partial(decoder_links, experts=partial(expert_links, names=ExpertNames(shared="shared_experts"))),
    values={
        **LATENT,
        **each("qkv_bias out_bias ffn_bias", BOTH),
        **each("rope.interleaved", TRUE),
        **each("moe.router.normalize moe.shared_gate", FALSE),
    },
    checks=(heads_divide_hidden, *latent_checks(_GROUP_MEMBERS)),
)
