"""ModelConfig to Hugging Face's config.json.

Both spellings of the rotary embedding are written, so that transformers 4 and 5 load an export.
"""

from __future__ import annotations

import math
from typing import Any

from ...configs.schema import ModelConfig, RopeConfig
from .config_read import yarn_scale
from .families import ARCHITECTURES, DEEPSEEK, NARROW, Family, hf_family


def hf_config(cfg: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of an export.

    Args:
        cfg: resolved model configuration.
        dtype: torch's name of the weights' type, e.g. ``bfloat16``.

    Raises:
        UserError: if no supported architecture expresses `cfg`.
    """
    family = hf_family(cfg)
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": cfg.vocab,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return common | (_gpt2_config(cfg) if family == "gpt2" else _decoder_config(cfg, family))


def _decoder_config(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    scaling = _rope_scaling(cfg.rope, family)
    config: dict[str, Any] = {
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.moe.ffn or cfg.ffn if family in NARROW else cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": cfg.rope.theta, **(scaling or {"rope_type": "default"})},
        "attention_dropout": 0.0,
    }
    if family not in DEEPSEEK:
        config["head_dim"] = cfg.head_dim
    if family in ("llama", "qwen3", "qwen3_moe", "olmoe", "gpt_oss", *DEEPSEEK):
        config["attention_bias"] = cfg.qkv_bias
    if family in ("llama", "deepseek_v2"):
        config["mlp_bias"] = cfg.ffn_bias
    config |= _window_config(cfg, family)
    if cfg.moe.experts:
        config |= _moe_config(cfg, family)
    return config


def _window_config(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    slides = cfg.window is not None
    kinds = ["full_attention" if cfg.window_of(i) is None else "sliding_attention" for i in range(cfg.layers)]
    match family:
        case "mistral" | "mixtral":
            return {"sliding_window": cfg.window}
        case "gpt_oss":
            return {"sliding_window": cfg.window, "layer_types": kinds}
        case "qwen3_moe":
            return {"use_sliding_window": slides, "sliding_window": cfg.window}
        case "qwen2" | "qwen3" | "qwen2_moe":
            return {
                "use_sliding_window": slides,
                "sliding_window": cfg.window,
                "max_window_layers": cfg.layers if not slides else 0,
                "layer_types": kinds,
            }
        case _:
            return {}


def _moe_config(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    moe, router = cfg.moe, cfg.moe.router
    found: dict[str, Any] = {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": router.aux_loss}
    match family:
        case "mixtral" | "gpt_oss":
            found["num_local_experts"] = moe.experts
        case "deepseek_v2" | "deepseek_v3":
            found["n_routed_experts"] = moe.experts
        case _:
            found |= {"num_experts": moe.experts, "norm_topk_prob": router.normalize}
    if family not in NARROW:
        found["moe_intermediate_size"] = moe.ffn or cfg.ffn
    if family in ("qwen2_moe", "qwen3_moe"):
        found |= _sparse_layers(cfg)
    if family == "qwen2_moe":
        found |= {"shared_expert_intermediate_size": moe.shared, "qkv_bias": cfg.qkv_bias}
    if family == "gpt_oss":
        found |= {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    return found | (_deepseek_config(cfg, family) if family in DEEPSEEK else {})


def _sparse_layers(cfg: ModelConfig) -> dict[str, Any]:
    first, every = cfg.moe.dense_layers, cfg.moe.every
    if first % every == 0:
        return {"decoder_sparse_step": every, "mlp_only_layers": list(range(first))}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(cfg.layers) if i not in cfg.moe_layers]}


def _deepseek_config(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    moe, router, mla = cfg.moe, cfg.moe.router, cfg.mla
    third = family == "deepseek_v3"
    method = "group_limited_greedy" if router.groups > 1 else "greedy"
    found: dict[str, Any] = {
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.q_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "n_shared_experts": moe.shared // (moe.ffn or cfg.ffn),
        "first_k_dense_replace": moe.dense_layers,
        "moe_layer_freq": 1,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": router.normalize,
        "scoring_func": router.score,
        "topk_method": "noaux_tc" if third else method,
        "n_group": router.groups,
        "topk_group": router.groups_kept or router.groups,
        "seq_aux": router.aux_level == "sequence",
    }
    return found | ({"rope_interleave": cfg.rope.interleaved, "num_nextn_predict_layers": 0} if third else {})


def _rope_scaling(rope: RopeConfig, family: Family) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    keys: tuple[str, ...] = ()
    if rope.scaling == "llama3":
        keys = ("low_freq_factor", "high_freq_factor")
    elif rope.scaling == "yarn":
        keys = ("beta_fast", "beta_slow", "attention_factor", "truncate")
    if keys:
        scaling["original_max_position_embeddings"] = rope.original_positions
    if family in DEEPSEEK and rope.score_factor != 1.0:
        scaling |= _mscales(rope)
    return scaling | {key: getattr(rope, key) for key in keys if getattr(rope, key) is not None}


def _mscales(rope: RopeConfig) -> dict[str, float]:
    """DeepSeek's two numbers: that of the scores, and that whose scale over the other's is the attention factor."""

    def inverse(scale: float) -> float:
        exact = (scale - 1) / (0.1 * math.log(rope.factor))
        short = round(exact, 9)  # published values have three digits
        return short if math.isclose(yarn_scale(rope.factor, short), scale, rel_tol=1e-14) else exact

    scores = math.sqrt(rope.score_factor)
    factor = yarn_scale(rope.factor) if rope.attention_factor is None else rope.attention_factor
    return {"mscale_all_dim": inverse(scores), "mscale": inverse(factor * scores)}


def _gpt2_config(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": cfg.hidden,
        "n_inner": cfg.ffn,
        "n_layer": cfg.layers,
        "n_head": cfg.heads,
        "n_positions": cfg.max_positions,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": "gelu_new" if cfg.activation == "gelu_tanh" else "gelu",
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
    }
