"""Hugging Face's config.json to ModelConfig.

Both spellings of the rotary embedding are read: `rope_theta` with `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...configs.errors import UserError
from ...configs.schema import ModelConfig, RopeConfig
from .families import ARCHITECTURES, DEEPSEEK, Family, family_of
from .moe_read import latent_fields, moe_fields, refuse_what_experts_lack
from .reader import Reader

# What transformers itself assumes for a key that config.json leaves out; the sizes are never assumed.
_LLAMA_LIKE = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
_QWEN = {**_LLAMA_LIKE, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
_QWEN_MOE = {**_QWEN, "decoder_sparse_step": 1, "norm_topk_prob": False}
_DEEPSEEK = {**_LLAMA_LIKE, "attention_bias": False, "q_lora_rank": 1536, "kv_lora_rank": 512}
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_LLAMA_LIKE, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {**_QWEN, "max_window_layers": 28, "num_key_value_heads": 32},
    "qwen3": {
        **_QWEN,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "attention_bias": False,
        "head_dim": 128,
    },
    "gpt2": {
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
    },
    "mixtral": {
        **_LLAMA_LIKE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {**_QWEN_MOE, "max_window_layers": 28, "num_key_value_heads": 16, "qkv_bias": True},
    "qwen3_moe": {**_QWEN_MOE, "num_key_value_heads": 4, "attention_bias": False},
    "olmoe": {
        **_LLAMA_LIKE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "norm_topk_prob": False,
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "rope_interleave": True,
    },
    "gpt_oss": {
        **_LLAMA_LIKE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
}
_THETAS: dict[Family, float] = {"mixtral": 1e6, "gpt_oss": 150000.0}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

_YARN_KEYS = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"}
_LLAMA3_KEYS = {"low_freq_factor", "high_freq_factor"}
_ROPE_KEYS = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The resolved ModelConfig of a config.json. Dropout is left at 0: it belongs to a job, not to the weights.

    Args:
        config: the parsed config.json.

    Raises:
        UserError: naming every key whose value the model cannot express.
    """
    family = family_of(config)
    reader = Reader(config, _DEFAULTS[family])
    reader.only("quantization_config")
    fields = _gpt2_fields(reader) if family == "gpt2" else _decoder_fields(reader, family)
    if reader.problems:
        raise UserError(*reader.problems)
    tied = bool(reader.value("tie_word_embeddings"))
    return ModelConfig(family=family, tied=tied, init_std=float(reader.number("initializer_range")), **fields)


def _decoder_fields(reader: Reader, family: Family) -> dict[str, Any]:
    hidden, heads, layers = (reader.integer(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    reader.only("hidden_act", "silu", "swish")
    bias = bool(reader.value("attention_bias"))
    if bias and family in ("mistral", "mixtral", "qwen2", "qwen2_moe"):
        # These models do not read the key; a file that has it comes from other code whose maths is not known here.
        reader.problem("attention_bias", f"True is not supported in {ARCHITECTURES[family]}")
    max_positions = reader.integer("max_position_embeddings")
    ffn = reader.integer("intermediate_size")
    window, window_every = _window(reader, family, layers)
    if family in DEEPSEEK:
        fields = latent_fields(reader, heads)
    else:
        fields = _head_fields(reader, hidden, heads)
    fields |= {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "ffn": ffn,
        "vocab": reader.integer("vocab_size"),
        "norm": "rms",
        "norm_eps": float(reader.number("rms_norm_eps")),
        "position": "rope",
        "max_positions": max_positions,
        "rope": _rope(reader, family, max_positions),
        "activation": "swiglu_clipped" if family == "gpt_oss" else "swiglu",
        "qk_norm": family in ("qwen3", "qwen3_moe", "olmoe"),
        "qk_norm_whole": family == "olmoe",
        "sinks": family == "gpt_oss",
        "qkv_bias": bias or family == "qwen2" or bool(family == "qwen2_moe" and reader.value("qkv_bias")),
        "out_bias": bias,
        "ffn_bias": bool(family in ("llama", "deepseek_v2") and reader.value("mlp_bias")),
        "window": window,
        "window_every": window_every,
    }
    refuse_what_experts_lack(reader, family)
    return fields | moe_fields(reader, family, layers, ffn)


def _head_fields(reader: Reader, hidden: int, heads: int) -> dict[str, Any]:
    kv_heads = heads if reader.value("num_key_value_heads") is None else reader.integer("num_key_value_heads")
    if heads % kv_heads:
        reader.problem("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if reader.value("head_dim") is None and hidden % heads:
        reader.problem("num_attention_heads", f"{heads} does not divide hidden_size {hidden}, and head_dim is absent")
    head_dim = hidden // heads if reader.value("head_dim") is None else reader.integer("head_dim")
    if head_dim % 2:
        reader.problem("head_dim", f"{head_dim} is odd; the rotary embedding needs pairs")
    return {"kv_heads": kv_heads, "head_dim": head_dim}


def _gpt2_fields(reader: Reader) -> dict[str, Any]:
    hidden, heads = reader.integer("n_embd"), reader.integer("n_head")
    if hidden % heads:
        reader.problem("n_head", f"{heads} does not divide n_embd {hidden}")
    reader.only("activation_function", *_GELUS)
    reader.only("scale_attn_weights", True)
    reader.only("scale_attn_by_inverse_layer_idx", False)
    reader.only("add_cross_attention", False)
    return {
        "layers": reader.integer("n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn": 4 * hidden if reader.value("n_inner") is None else reader.integer("n_inner"),
        "vocab": reader.integer("vocab_size"),
        "norm": "layer",
        "norm_eps": float(reader.number("layer_norm_epsilon")),
        "position": "learned",
        "max_positions": reader.integer("n_positions"),
        "activation": _GELUS.get(reader.value("activation_function"), "gelu"),
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
    }


def _window(reader: Reader, family: Family, layers: int) -> tuple[int | None, int]:
    """The window, or None, and every how many layers it holds, from the first on; another pattern is a problem."""
    if family in ("llama", "olmoe", *DEEPSEEK):
        reader.only("sliding_window")
        return None, 1
    sliding = [kind == "sliding_attention" for kind in _attention_kinds(reader, family, layers)]
    if not any(sliding):
        return None, 1
    every = sliding.index(True, 1) if any(sliding[1:]) else len(sliding)
    if sliding != [i % every == 0 for i in range(len(sliding))] or (len(sliding) != layers):
        key = "layer_types" if "layer_types" in reader.config else "max_window_layers"
        kinds = f"{sliding.count(False)} × full_attention, {sliding.count(True)} × sliding_attention"
        pattern = "layers of different attention are not supported, unless sliding ones are every n-th from the first"
        reader.problem(key, f"{pattern}; found {kinds} of {layers} layers")
        return None, 1
    return reader.integer("sliding_window"), every


def _attention_kinds(reader: Reader, family: Family, layers: int) -> list[str]:
    """What every layer attends to: as config.json says, or as transformers derives it."""
    given = reader.value("layer_types") if family not in ("mixtral", "qwen3_moe") else None
    if given is not None:
        for kind in sorted({str(kind) for kind in given} - {"full_attention", "sliding_attention"}):
            reader.problem("layer_types", f"{kind!r} is not supported, only full_attention and sliding_attention")
        return list(given)
    first, every = 0, 1
    match family:
        case "mistral" | "mixtral":
            on = reader.value("sliding_window") is not None
        case "gpt_oss":
            on, every = True, 2
        case _:
            on = bool(reader.value("use_sliding_window"))
    last = layers if on else 0
    borders = int(reader.value("max_window_layers") or 0)
    if on and family in ("qwen2", "qwen3"):
        first = borders
    elif on and family == "qwen2_moe":
        every, last = 2, min(last, borders)
    slides = (first <= i < last and i % every == 0 for i in range(layers))
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _rope(reader: Reader, family: Family, max_positions: int) -> RopeConfig:
    source = next((k for k in ("rope_scaling", "rope_parameters") if reader.config.get(k)), "rope_parameters")
    given = reader.config.get(source) or (_GPT_OSS_ROPE if family == "gpt_oss" else {})
    if not isinstance(given, Mapping):
        reader.problem(source, f"{given!r} is not an object")
        return RopeConfig()
    # transformers: an original length beside the rotary embedding's object wins over the one in it, and a missing one
    # is the present length; a missing theta is the outer one, else the family's.
    outer = reader.config.get("original_max_position_embeddings")
    defaults = {
        "rope_theta": reader.config.get("rope_theta") or _THETAS.get(family, 10000.0),
        "original_max_position_embeddings": max_positions,
        "partial_rotary_factor": reader.config.get("partial_rotary_factor"),
        "rope_type": given.get("type", "default"),
        "truncate": True,
    }
    if outer is not None:
        given = {**given, "original_max_position_embeddings": outer}
    if given.get("rope_type", given.get("type")) == "yarn" and given.get("factor", 0) is None:
        original = Reader(given, defaults, f"{source}.", reader.problems).integer("original_max_position_embeddings")
        given = {**given, "factor": max_positions / original}
    rope = Reader(given, defaults, f"{source}.", reader.problems)
    for key in sorted(set(given) - _ROPE_KEYS - _YARN_KEYS - _LLAMA3_KEYS):
        rope.problem(key, f"{given[key]!r} is not supported")
    rope.only("rope_type", "default", "linear", "llama3", "yarn")
    rope.only("partial_rotary_factor", 1.0)
    kind = rope.value("rope_type")
    fields: dict[str, Any] = {"theta": float(rope.number("rope_theta"))}
    if kind in ("linear", "llama3", "yarn"):
        fields |= {"scaling": kind, "factor": float(rope.number("factor"))}
    if kind in ("llama3", "yarn"):
        fields["original_positions"] = rope.integer("original_max_position_embeddings")
    if kind == "llama3":
        fields |= {key: float(rope.number(key)) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= {
            "beta_fast": float(rope.value("beta_fast") or 32.0),
            "beta_slow": float(rope.value("beta_slow") or 1.0),
            "attention_factor": _yarn_attention_factor(rope, fields["factor"]),
            "truncate": bool(rope.value("truncate")),
        }
    if family in DEEPSEEK:
        fields["interleaved"] = family == "deepseek_v2" or bool(reader.value("rope_interleave"))
        if rope.value("mscale_all_dim") and kind != "default":
            fields["score_factor"] = yarn_scale(fields.get("factor", 1.0), rope.number("mscale_all_dim")) ** 2
    return RopeConfig(**fields)


def yarn_scale(factor: float, m: float = 1.0) -> float:
    """0.1 m ln(factor) + 1 (YaRN, arXiv 2309.00071, section 3.4, with DeepSeek's m)."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _yarn_attention_factor(rope: Reader, factor: float) -> float:
    """Multiplier of cos and sin: given, or the quotient of two scales, or one."""
    if rope.value("attention_factor") is not None:
        return float(rope.number("attention_factor"))
    if rope.value("mscale") and rope.value("mscale_all_dim"):
        return yarn_scale(factor, rope.number("mscale")) / yarn_scale(factor, rope.number("mscale_all_dim"))
    return yarn_scale(factor)
