"""The parts of config.json that are about experts and latent attention."""

from __future__ import annotations

from typing import Any

from ...configs.schema import MlaConfig, MoeConfig, RouterConfig
from .families import ARCHITECTURES, DEEPSEEK, LATENT_EPS, NARROW, Family
from .reader import Reader

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""The same under transformers' different names, which also depend on its version."""


def refuse_what_experts_lack(reader: Reader, family: Family) -> None:
    """Records what the architecture's own code can do and ours cannot, or what a file claims and that code ignores."""
    match family:
        case "olmoe":
            reader.only("clip_qkv")
        case "gpt_oss":
            reader.only("swiglu_alpha", 1.702)
            reader.only("swiglu_limit", 7.0)
        case "deepseek_v2":
            reader.only("norm_topk_prob", False)
            reader.only("scoring_func", "softmax")
            reader.only("topk_method", "greedy", "group_limited_greedy")
        case "deepseek_v3":
            reader.only("scoring_func", "sigmoid")
            reader.only("topk_method", "noaux_tc")
    if family in DEEPSEEK:
        reader.only("moe_layer_freq", 1)
        if reader.value("rms_norm_eps") not in (None, LATENT_EPS):
            message = (
                f"{reader.value('rms_norm_eps')} is not supported, only {LATENT_EPS}, which {ARCHITECTURES[family]} "
            )
            reader.problem("rms_norm_eps", message + "has in the norms of its latent vectors whatever the key says")


def latent_fields(reader: Reader, heads: int) -> dict[str, Any]:
    """The keys of ModelConfig that describe latent attention."""
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


def moe_fields(reader: Reader, family: Family, layers: int, ffn: int) -> dict[str, Any]:
    """The key `moe` of ModelConfig, where the family has experts."""
    if family not in (*NARROW, *DEEPSEEK, "qwen2_moe", "qwen3_moe"):
        return {}
    experts = reader.integer(reader.first(*_EXPERTS))
    top_k = reader.integer("num_experts_per_tok")
    if top_k > experts:
        reader.problem("num_experts_per_tok", f"{top_k} is more than the {experts} experts")
    width = ffn if family in NARROW else reader.integer("moe_intermediate_size")
    dense_layers, every = _sparse_layers(reader, family, layers)
    moe = MoeConfig(
        experts=experts,
        top_k=top_k,
        ffn=width,
        shared=_shared(reader, family, width),
        shared_gate=family == "qwen2_moe",
        bias=family == "gpt_oss",
        dense_layers=dense_layers,
        every=every,
        router=_router(reader, family, experts),
    )
    return {"moe": moe}


def _shared(reader: Reader, family: Family, width: int) -> int:
    if family == "qwen2_moe":
        return reader.integer("shared_expert_intermediate_size")
    return reader.integer("n_shared_experts") * width if family in DEEPSEEK else 0


def _router(reader: Reader, family: Family, experts: int) -> RouterConfig:
    groups = kept = 1
    grouped = family == "deepseek_v3" or reader.value("topk_method") == "group_limited_greedy"
    if family in DEEPSEEK and grouped:
        groups, kept = reader.integer("n_group"), reader.integer("topk_group")
        if experts % groups:
            reader.problem("n_group", f"{groups} does not divide the {experts} experts")
        if kept > groups:
            reader.problem("topk_group", f"{kept} is more than n_group {groups}")
    loss = reader.first("router_aux_loss_coef", "aux_loss_alpha")
    return RouterConfig(
        score="sigmoid" if family == "deepseek_v3" else "softmax",
        normalize=family in ("mixtral", "gpt_oss") or bool(reader.value("norm_topk_prob")),
        scale=float(reader.number("routed_scaling_factor")) if family in DEEPSEEK else 1.0,
        groups=groups,
        groups_kept=kept,
        group_members=1 if family == "deepseek_v2" else 2,
        logit_bias=family == "gpt_oss",
        selection_bias=family == "deepseek_v3",
        aux_loss=float(reader.number(loss, zero=True)) if reader.value(loss) is not None else 0.0,
        aux_level="sequence" if reader.value("seq_aux") else "micro_batch",
    )


def _sparse_layers(reader: Reader, family: Family, layers: int) -> tuple[int, int]:
    """(dense first layers, every how many layers after them have experts)."""
    if family in DEEPSEEK:
        return (reader.integer("first_k_dense_replace", zero=True) if reader.value("first_k_dense_replace") else 0), 1
    if family in NARROW:
        return 0, 1
    step, dense = reader.integer("decoder_sparse_step"), set(reader.value("mlp_only_layers") or ())
    sparse = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    candidates = [(first, every) for every in (step, *range(1, layers + 1)) for first in range(layers)]
    for first, every in candidates:
        if sparse and sparse == [i for i in range(first, layers) if (i - first + 1) % every == 0]:
            return first, every
    key = "mlp_only_layers" if dense else "decoder_sparse_step"
    message = "layers with experts must be every n-th one after dense first layers"
    reader.problem(key, f"{reader.value(key)!r} is not supported; {message}, found {sparse} of {layers}")
    return 0, 1
