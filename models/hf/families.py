"""The supported Hugging Face architectures, and which of them expresses a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...configs.errors import Problem, UserError
from ...configs.schema import ModelConfig

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
]

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}

DEEPSEEK: tuple[Family, ...] = ("deepseek_v2", "deepseek_v3")
"""Those with latent attention."""
LATENT_EPS = 1e-6
"""In DeepSeek's model code the norms of the latent vectors have this epsilon, whatever config.json says."""
NARROW: tuple[Family, ...] = ("mixtral", "olmoe", "gpt_oss")
"""Those where `intermediate_size` is an expert's inner width: they have no dense feed-forward network."""

_Allowed = dict[str, tuple[Any, ...]]
_FALSE, _TRUE, _BOTH = (False,), (True,), (False, True)


def _all(keys: str, allowed: tuple[Any, ...]) -> _Allowed:
    return dict.fromkeys(keys.split(), allowed)


_PLAIN: _Allowed = {
    **_all("norm", ("rms",)),
    **_all("position", ("rope",)),
    **_all("activation", ("swiglu",)),
    **_all("qk_norm qk_norm_whole sinks rope.interleaved", _FALSE),
    **_all("mla.kv_rank mtp", (0,)),
    **_all("attention_every", (1,)),
    **_all("rope.score_factor", (1.0,)),
}
_DENSE: _Allowed = {**_PLAIN, **_all("moe.experts", (0,))}
_ROUTED: _Allowed = {
    **_PLAIN,
    **_all("qkv_bias out_bias ffn_bias moe.bias", _FALSE),
    **_all("moe.router.name", ("top_k",)),
    **_all("moe.router.score", ("softmax",)),
    **_all("moe.router.scale", (1.0,)),
    **_all("moe.router.groups", (1,)),
    **_all("moe.router.logit_bias moe.router.selection_bias", _FALSE),
    **_all("moe.router.null_experts moe.shared", (0,)),
}
_LATENT: _Allowed = {
    key: allowed
    for key, allowed in {**_ROUTED, **_all("norm_eps", (LATENT_EPS,))}.items()
    if key not in ("mla.kv_rank", "moe.shared", "moe.router.scale", "moe.router.groups", "rope.score_factor")
}

# The values that each architecture can express, by key; the keys that it does not name are free.
_EXPRESSIBLE: dict[Family, _Allowed] = {
    "llama": _DENSE,
    "mistral": {**_DENSE, **_all("qkv_bias out_bias ffn_bias", _FALSE)},
    "qwen2": {**_DENSE, **_all("qkv_bias", _TRUE), **_all("out_bias ffn_bias", _FALSE)},
    "qwen3": {**_DENSE, **_all("qk_norm", _TRUE), **_all("ffn_bias", _FALSE)},
    "gpt2": {
        **_all("norm", ("layer",)),
        **_all("position", ("learned",)),
        **_all("activation", ("gelu", "gelu_tanh")),
        **_all("qk_norm sinks", _FALSE),
        **_all("mla.kv_rank moe.experts mtp", (0,)),
        **_all("attention_every", (1,)),
        **_all("qkv_bias out_bias ffn_bias", _TRUE),
    },
    "mixtral": {**_ROUTED, **_all("moe.router.normalize", _TRUE)},
    "qwen2_moe": {
        **{key: allowed for key, allowed in _ROUTED.items() if key != "moe.shared"},
        **_all("qkv_bias", _BOTH),
        **_all("moe.shared_gate", _TRUE),
    },
    "qwen3_moe": {**_ROUTED, **_all("qk_norm", _TRUE), **_all("qkv_bias out_bias", _BOTH)},
    "olmoe": {**_ROUTED, **_all("qk_norm qk_norm_whole", _TRUE), **_all("qkv_bias out_bias", _BOTH)},
    "deepseek_v2": {
        **_LATENT,
        **_all("qkv_bias out_bias ffn_bias", _BOTH),
        **_all("rope.interleaved", _TRUE),
        **_all("moe.router.normalize moe.shared_gate", _FALSE),
    },
    "deepseek_v3": {
        **_LATENT,
        **_all("qkv_bias out_bias rope.interleaved", _BOTH),
        **_all("moe.router.score", ("sigmoid",)),
        **_all("moe.router.selection_bias", _TRUE),
        **_all("moe.shared_gate", _FALSE),
    },
    "gpt_oss": {
        **_ROUTED,
        **_all("activation", ("swiglu_clipped",)),
        **_all("qkv_bias out_bias ffn_bias", _BOTH),
        **_all("sinks moe.bias moe.router.logit_bias moe.router.normalize", _TRUE),
    },
}
_ONE_ATTENTION_BIAS: tuple[Family, ...] = ("llama", "qwen3", "qwen3_moe", "olmoe", "gpt_oss", *DEEPSEEK)
_WIDE_HEADS: tuple[Family, ...] = ("gpt2", "olmoe")
_NO_WINDOW: tuple[Family, ...] = ("llama", "gpt2", "olmoe", *DEEPSEEK)
_ONE_WINDOW: tuple[Family, ...] = ("mistral", "mixtral", "qwen3_moe")


def family_of(config: Mapping[str, Any]) -> Family:
    """Family of a config.json, by `architectures`, or by `model_type` where that is absent.

    Raises:
        UserError: for any other architecture.
    """
    names = config.get("architectures") or []
    for family, architecture in ARCHITECTURES.items():
        if architecture in names or (not names and config.get("model_type") == family):
            return family
    key, found = ("architectures", names) if names else ("model_type", config.get("model_type"))
    supported = ", ".join(ARCHITECTURES.values())
    raise UserError(Problem(f"config.json {key}", f"{found!r} is not supported, only {supported}"))


def hf_family(cfg: ModelConfig) -> Family:
    """The family whose Hugging Face architecture expresses `cfg`: its own where possible, else the first that can.

    Raises:
        UserError: naming the keys in the way of its own family's architecture, if none can.
    """
    for family in (cfg.family, *ARCHITECTURES):
        if not _obstacles(cfg, family):
            return family
    raise UserError(*_obstacles(cfg, cfg.family))


def _value(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def _obstacles(cfg: ModelConfig, family: Family) -> list[Problem]:
    """Why `family`'s architecture cannot express `cfg`; empty if it can."""
    found = [
        Problem(f"model.{key}", f"{_value(cfg, key)} cannot be exported as {ARCHITECTURES[family]}")
        for key, allowed in _EXPRESSIBLE[family].items()
        if _value(cfg, key) not in allowed
    ]
    return found + _size_obstacles(cfg, family) + _window_obstacles(cfg, family) + _moe_obstacles(cfg, family)


def _size_obstacles(cfg: ModelConfig, family: Family) -> list[Problem]:
    found: list[Problem] = []
    if cfg.linear_layers:
        message = f"{cfg.attention_every}: linear attention cannot be exported as {ARCHITECTURES[family]}"
        found.append(Problem("model.attention_every", message))
    if family in _ONE_ATTENTION_BIAS and cfg.qkv_bias != cfg.out_bias:
        found.append(Problem("model.out_bias", f"{cfg.out_bias} must equal model.qkv_bias {cfg.qkv_bias} for export"))
    if family in ("llama", "deepseek_v2") and cfg.hidden % cfg.heads:
        found.append(Problem("model.heads", f"{cfg.heads} must divide model.hidden {cfg.hidden} for export"))
    if family in ("gpt2", *DEEPSEEK) and cfg.kv_heads != cfg.heads:
        found.append(Problem("model.kv_heads", f"{cfg.kv_heads} must equal model.heads {cfg.heads} for export"))
    if family in _WIDE_HEADS and cfg.heads * (cfg.head_dim or 0) != cfg.hidden:
        size = f"{cfg.head_dim} × model.heads {cfg.heads}"
        found.append(Problem("model.head_dim", f"{size} must equal model.hidden {cfg.hidden} for export"))
    if family in DEEPSEEK and not cfg.mla.kv_rank:
        found.append(Problem("model.mla.kv_rank", f"0 cannot be exported as {ARCHITECTURES[family]}"))
    if family in DEEPSEEK and cfg.rope.score_factor != 1.0 and (cfg.rope.scaling == "none" or cfg.rope.factor <= 1):
        message = f"{cfg.rope.score_factor} cannot be exported without model.rope.scaling and a factor above 1"
        found.append(Problem("model.rope.score_factor", message))
    return found


def _window_obstacles(cfg: ModelConfig, family: Family) -> list[Problem]:
    name = ARCHITECTURES[family]
    if cfg.window is not None and family in _NO_WINDOW:
        return [Problem("model.window", f"{cfg.window} cannot be exported as {name}")]
    if cfg.window is not None and cfg.window_every != 1 and family in _ONE_WINDOW:
        return [Problem("model.window_every", f"{cfg.window_every} cannot be exported as {name}")]
    return []


def _moe_obstacles(cfg: ModelConfig, family: Family) -> list[Problem]:
    if _EXPRESSIBLE[family].get("moe.experts") == (0,):
        return []
    moe, name = cfg.moe, ARCHITECTURES[family]
    if not moe.experts:
        return [Problem("model.moe.experts", f"0 cannot be exported as {name}")]
    found: list[Problem] = []
    if family in NARROW and len(cfg.moe_layers) != cfg.layers:
        found.append(Problem("model.moe.dense_layers", f"{name} has experts in all layers"))
    if family in DEEPSEEK and cfg.moe_layers != tuple(range(moe.dense_layers, cfg.layers)):
        found.append(Problem("model.moe.every", f"{moe.every} cannot be exported as {name}"))
    if family in ("qwen2_moe", *DEEPSEEK) and not moe.shared:
        found.append(Problem("model.moe.shared", f"0 cannot be exported as {name}"))
    if family in DEEPSEEK and moe.shared % (moe.ffn or cfg.ffn):
        message = f"{moe.shared} must be a multiple of model.moe.ffn {moe.ffn} for export"
        found.append(Problem("model.moe.shared", message))
    members = {"deepseek_v2": 1, "deepseek_v3": 2}.get(family)
    if members and moe.router.groups > 1 and moe.router.group_members != members:
        message = f"{moe.router.group_members} cannot be exported as {name}, only {members}"
        found.append(Problem("model.moe.router.group_members", message))
    return found
