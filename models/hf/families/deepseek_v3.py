"""DeepSeek V3: V2's layer with sigmoid scores and a selection bias."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from ....configs.schema import ModelConfig
from ..expressible import BOTH, FALSE, TRUE, each
from ..latent import LATENT, LATENT_ABSENT, latent_checks, read_latent_decoder, read_latent_moe, write_latent
from ..names import ExpertNames, decoder_links, expert_links
from ..reader import Reader
from .family import Family

_GROUP_MEMBERS = 2
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _read(reader: Reader) -> dict[str, Any]:
    reader.only("scoring_func", "sigmoid")
    reader.only("topk_method", "noaux_tc")
    return {
        **read_latent_decoder(reader, FAMILY.architecture, interleaved=bool(reader.value("rope_interleave"))),
        **read_latent_moe(reader, grouped=True, score="sigmoid", selection_bias=True, group_members=_GROUP_MEMBERS),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_latent(cfg, "noaux_tc"),
        "rope_interleave": cfg.rope.interleaved,
        "num_nextn_predict_layers": 0,
    }


def _passed_over(cfg: ModelConfig, name: str) -> str:
    """The modules of multi-token prediction are stored as further layers."""
    layer = _LAYER.match(name)
    return "multi-token prediction" if layer is not None and int(layer[1]) >= cfg.layers else ""


FAMILY = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    absent={
        **LATENT_ABSENT,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "rope_interleave": True,
    },
    read=_read,
    write=_write,
    links=partial(decoder_links, experts=partial(expert_links, names=ExpertNames(shared="shared_experts"))),
    passed_over=_passed_over,
    values={
        **LATENT,
        **each("qkv_bias out_bias rope.interleaved", BOTH),
        **each("moe.router.score", ("sigmoid",)),
        **each("moe.router.selection_bias", TRUE),
        **each("moe.shared_gate", FALSE),
    },
    checks=latent_checks(_GROUP_MEMBERS),
)
