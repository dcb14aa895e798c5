"""DeepSeek's layer, which two families have: latent attention, and shared experts after dense first layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...configs.errors import Problem
from ...configs.schema import MlaConfig, ModelConfig
from .decoder import LLAMA_LIKE, read_attention_bias, read_decoder, write_decoder
from .expressible import (
    ROUTED,
    Allowed,
    Check,
    all_key_heads,
    each,
    one_attention_bias,
    with_experts,
    with_shared_expert,
    without_window,
)
from .moe import read_experts, read_moe, read_router, write_moe
from .reader import Reader
from .rope import read_score_factor
from .windows import no_window

LATENT_EPS = 1e-6
"""In DeepSeek's model code the norms of the latent vectors have this epsilon, whatever config.json says."""
LATENT_ABSENT = {**LLAMA_LIKE, "attention_bias": False, "q_lora_rank": 1536, "kv_lora_rank": 512}
LATENT: Allowed = {
    key: allowed
    for key, allowed in {**ROUTED, **each("norm_eps", (LATENT_EPS,))}.items()
    if key not in ("mla.kv_rank", "moe.shared", "moe.router.scale", "moe.router.groups", "rope.score_factor")
}


def read_latent_decoder(reader: Reader, architecture: str, *, interleaved: bool) -> dict[str, Any]:
    """All but the experts.

    Args:
        reader: of config.json.
        architecture: for messages.
        interleaved: dimensions 2i and 2i + 1 turn together.
    """
    reader.only("moe_layer_freq", 1)
    if reader.value("rms_norm_eps") not in (None, LATENT_EPS):
        message = f"{reader.value('rms_norm_eps')} is not supported, only {LATENT_EPS}, which {architecture} "
        reader.problem("rms_norm_eps", message + "has in the norms of its latent vectors whatever the key says")
    fields = read_decoder(reader)
    score_factor = read_score_factor(reader, fields["rope"])
    rope = replace(fields["rope"], interleaved=interleaved, score_factor=score_factor)
    return fields | no_window(reader) | _read_latent(reader) | read_attention_bias(reader) | {"rope": rope}


def _read_latent(reader: Reader) -> dict[str, Any]:
    heads = reader.integer("num_attention_heads")
    reader.only("num_key_value_heads", heads)
    mla = MlaConfig(
        kv_rank=reader.integer("kv_lora_rank"),
        q_rank=None if reader.value("q_lora_rank") is None else reader.integer("q_lora_rank"),
        nope_dim=reader.integer("qk_nope_head_dim"),
        rope_dim=reader.integer("qk_rope_head_dim"),
        value_dim=reader.integer("v_head_dim"),
    )
    if mla.rope_dim % 2:
        reader.problem("qk_rope_head_dim", f"{mla.rope_dim} is odd; the rotary embedding needs pairs")
    return {"mla": mla, "kv_heads": heads, "head_dim": mla.nope_dim + mla.rope_dim}


def read_latent_moe(reader: Reader, *, grouped: bool, **router: Any) -> dict[str, Any]:
    """The experts.

    Args:
        reader: of config.json.
        grouped: tokens go to the experts of the best groups only.
        router: further keys of RouterConfig.
    """
    groups, kept = _groups(reader) if grouped else (1, 1)
    scale = float(reader.number("routed_scaling_factor"))
    width = reader.integer("moe_intermediate_size")
    return read_moe(
        reader,
        width=width,
        router=read_router(reader, scale=scale, groups=groups, groups_kept=kept, **router),
        shared=reader.integer("n_shared_experts") * width,
        dense_layers=reader.integer("first_k_dense_replace", zero=True) if reader.value("first_k_dense_replace") else 0,
    )


def _groups(reader: Reader) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use."""
    groups, kept, experts = reader.integer("n_group"), reader.integer("topk_group"), read_experts(reader)
    if experts % groups:
        reader.problem("n_group", f"{groups} does not divide the {experts} experts")
    if kept > groups:
        reader.problem("topk_group", f"{kept} is more than n_group {groups}")
    return groups, kept


def write_latent(cfg: ModelConfig, topk_method: str) -> dict[str, Any]:
    """Everything that both families have in config.json."""
    moe, router, mla = cfg.moe, cfg.moe.router, cfg.mla
    return {
        **write_decoder(cfg, mscale=True),
        **write_moe(cfg, "n_routed_experts"),
        "attention_bias": cfg.qkv_bias,
        "moe_intermediate_size": moe.ffn,
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.q_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "n_shared_experts": moe.shared // (moe.ffn),
        "first_k_dense_replace": moe.dense_layers,
        "moe_layer_freq": 1,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": router.normalize,
        "scoring_func": router.score,
        "topk_method": topk_method,
        "n_group": router.groups,
        "topk_group": router.groups_kept,
        "seq_aux": router.aux_level == "sequence",
    }


def latent_checks(group_members: int) -> tuple[Check, ...]:
    """What both architectures ask of several keys.

    Args:
        group_members: a group of experts is judged by so many of its best ones.
    """

    def members(cfg: ModelConfig, name: str) -> list[Problem]:
        found = cfg.moe.router.group_members
        if not cfg.moe.experts or cfg.moe.router.groups <= 1 or found == group_members:
            return []
        message = f"{found} cannot be exported as {name}, only {group_members}"
        return [Problem("model.moe.router.group_members", message)]

    return (
        one_attention_bias,
        all_key_heads,
        _with_latent_attention,
        _score_factor_of_yarn,
        without_window,
        with_experts,
        _dense_first_layers,
        with_shared_expert,
        _whole_shared_experts,
        members,
    )


def _with_latent_attention(cfg: ModelConfig, name: str) -> list[Problem]:
    return [] if cfg.mla.kv_rank else [Problem("model.mla.kv_rank", f"0 cannot be exported as {name}")]


def _score_factor_of_yarn(cfg: ModelConfig, name: str) -> list[Problem]:
    """The factor stands in YaRN's object, as the logarithm of its own factor."""
    rope = cfg.rope
    if rope.score_factor == 1.0 or (rope.scaling != "none" and rope.factor > 1):
        return []
    message = f"{rope.score_factor} cannot be exported without model.rope.scaling and a factor above 1"
    return [Problem("model.rope.score_factor", message)]


def _dense_first_layers(cfg: ModelConfig, name: str) -> list[Problem]:
    """`first_k_dense_replace` is the only key that says which layers have no experts."""
    moe = cfg.moe
    if not moe.experts or cfg.moe_layers == tuple(range(moe.dense_layers, cfg.layers)):
        return []
    return [Problem("model.moe.every", f"{moe.every} cannot be exported as {name}")]


def _whole_shared_experts(cfg: ModelConfig, name: str) -> list[Problem]:
    """Shared experts are counted, each as wide as a routed one."""
    moe = cfg.moe
    if not moe.experts or moe.shared % (moe.ffn) == 0:
        return []
    message = f"{moe.shared} must be a multiple of model.moe.ffn {moe.ffn} for export"
    return [Problem("model.moe.shared", message)]
