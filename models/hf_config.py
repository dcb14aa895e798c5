"""Hugging Face's config.json to ModelConfig and back, for the five supported architectures.

Both spellings of the rotary embedding are read: `rope_theta` with `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5). Both are written, so that either version loads an export.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..configs.errors import Problem, UserError
from ..configs.schema import ModelConfig, RopeConfig

Family = Literal["llama", "qwen2", "qwen3", "mistral", "gpt2"]

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

# What transformers itself assumes for a key that config.json leaves out; the sizes are never assumed.
_LLAMA_LIKE = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
_QWEN = {**_LLAMA_LIKE, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
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
}

_YARN_KEYS = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"}
_LLAMA3_KEYS = {"low_freq_factor", "high_freq_factor"}
_ROPE_KEYS = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


@dataclass
class _Reader:
    """Typed access to config.json that collects every problem instead of stopping at the first."""

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str = ""
    problems: list[Problem] = field(default_factory=list)

    def value(self, key: str) -> Any:
        return self.config[key] if key in self.config else self.defaults.get(key)

    def problem(self, key: str, message: str) -> None:
        self.problems.append(Problem(f"config.json {self.prefix}{key}", message))

    def number(self, key: str) -> float:
        found = self.value(key)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found) or found <= 0:
            self.problem(key, "missing, expected a positive number" if found is None else f"{found!r} is not positive")
            return 1.0
        return found

    def integer(self, key: str) -> int:
        found = self.number(key)
        if int(found) != found:
            self.problem(key, f"{found!r} is not an integer")
            return 1
        return int(found)

    def only(self, key: str, *allowed: Any) -> None:
        """Record a problem unless the value is absent or one of `allowed`."""
        found = self.value(key)
        if found is not None and found not in allowed:
            listed = ", ".join(repr(a) for a in allowed)
            self.problem(key, f"{found!r} is not supported, only {listed}")


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


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The resolved ModelConfig of a config.json. Dropout is left at 0: it belongs to a job, not to the weights.

    Args:
        config: the parsed config.json.

    Raises:
        UserError: naming every key whose value the model cannot express.
    """
    family = family_of(config)
    reader = _Reader(config, _DEFAULTS[family])
    reader.only("quantization_config")
    fields = _gpt2_fields(reader) if family == "gpt2" else _llama_fields(reader, family)
    if reader.problems:
        raise UserError(*reader.problems)
    tied = bool(reader.value("tie_word_embeddings"))
    return ModelConfig(family=family, tied=tied, init_std=float(reader.number("initializer_range")), **fields)


def _llama_fields(reader: _Reader, family: Family) -> dict[str, Any]:
    hidden, heads, layers = (reader.integer(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = heads if reader.value("num_key_value_heads") is None else reader.integer("num_key_value_heads")
    if heads % kv_heads:
        reader.problem("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if reader.value("head_dim") is None and hidden % heads:
        reader.problem("num_attention_heads", f"{heads} does not divide hidden_size {hidden}, and head_dim is absent")
    head_dim = hidden // heads if reader.value("head_dim") is None else reader.integer("head_dim")
    if head_dim % 2:
        reader.problem("head_dim", f"{head_dim} is odd; the rotary embedding needs pairs")
    reader.only("hidden_act", "silu", "swish")
    bias = bool(reader.value("attention_bias"))
    if bias and family in ("mistral", "qwen2"):
        # Neither model reads the key; a file that has it comes from other code whose maths is not known here.
        reader.problem("attention_bias", f"True is not supported in {ARCHITECTURES[family]}")
    max_positions = reader.integer("max_position_embeddings")
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn": reader.integer("intermediate_size"),
        "vocab": reader.integer("vocab_size"),
        "norm": "rms",
        "norm_eps": float(reader.number("rms_norm_eps")),
        "position": "rope",
        "max_positions": max_positions,
        "rope": _rope(reader, max_positions),
        "activation": "swiglu",
        "qk_norm": family == "qwen3",
        "qkv_bias": bias or family == "qwen2",
        "out_bias": bias,
        "ffn_bias": bool(reader.value("mlp_bias")),
        "window": _window(reader, family, layers),
    }


def _gpt2_fields(reader: _Reader) -> dict[str, Any]:
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


def _window(reader: _Reader, family: Family, layers: int) -> int | None:
    """The window that all layers share, or None; a mixture of full and sliding layers is a problem."""
    if family == "llama":
        reader.only("sliding_window")
        return None
    kinds = reader.value("layer_types")
    if kinds is None and family == "mistral":
        kinds = ["sliding_attention" if reader.value("sliding_window") is not None else "full_attention"]
    elif kinds is None:
        first = int(reader.value("max_window_layers") or 0) if reader.value("use_sliding_window") else layers
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        key = "layer_types" if "layer_types" in reader.config else "max_window_layers"
        listed = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in sorted(set(kinds)))
        reader.problem(key, f"layers of different attention are not supported, found {listed}")
        return None
    return reader.integer("sliding_window")


def _rope(reader: _Reader, max_positions: int) -> RopeConfig:
    source = next((k for k in ("rope_scaling", "rope_parameters") if reader.config.get(k)), "rope_parameters")
    given = reader.config.get(source) or {}
    if not isinstance(given, Mapping):
        reader.problem(source, f"{given!r} is not an object")
        return RopeConfig()
    # transformers: a missing original length is the present one, a missing theta the outer one, else 10000.
    defaults = {
        "rope_theta": reader.config.get("rope_theta") or 10000.0,
        "original_max_position_embeddings": reader.config.get("original_max_position_embeddings") or max_positions,
        "partial_rotary_factor": reader.config.get("partial_rotary_factor"),
        "rope_type": given.get("type", "default"),
        "truncate": True,
    }
    rope = _Reader(given, defaults, f"{source}.", reader.problems)
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
        rope.only("truncate", True)
        fields |= {
            "beta_fast": float(rope.value("beta_fast") or 32.0),
            "beta_slow": float(rope.value("beta_slow") or 1.0),
            "attention_factor": _yarn_attention_factor(rope, fields["factor"]),
        }
    return RopeConfig(**fields)


def _yarn_attention_factor(rope: _Reader, factor: float) -> float:
    """Multiplier of cos and sin: given, or 0.1 m ln(factor) + 1 (YaRN, arXiv 2309.00071, section 3.4)."""
    if rope.value("attention_factor") is not None:
        return float(rope.number("attention_factor"))

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.value("mscale") and rope.value("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)


_ROPE_MODEL = {"norm": ("rms",), "position": ("rope",), "activation": ("swiglu",)}
_EXPRESSIBLE: dict[Family, dict[str, tuple[Any, ...]]] = {
    "llama": {**_ROPE_MODEL, "qk_norm": (False,), "window": (None,)},
    "mistral": {**_ROPE_MODEL, **{k: (False,) for k in ("qk_norm", "qkv_bias", "out_bias", "ffn_bias")}},
    "qwen2": {**_ROPE_MODEL, "qkv_bias": (True,), **{k: (False,) for k in ("qk_norm", "out_bias", "ffn_bias")}},
    "qwen3": {**_ROPE_MODEL, "qk_norm": (True,), "ffn_bias": (False,)},
    "gpt2": {
        "norm": ("layer",),
        "position": ("learned",),
        "activation": ("gelu", "gelu_tanh"),
        "qk_norm": (False,),
        "window": (None,),
        **{k: (True,) for k in ("qkv_bias", "out_bias", "ffn_bias")},
    },
}


def _obstacles(cfg: ModelConfig, family: Family) -> list[Problem]:
    """Why `family`'s architecture cannot express `cfg`; empty if it can."""
    found = [
        Problem(f"model.{key}", f"{getattr(cfg, key)} cannot be exported as {ARCHITECTURES[family]}")
        for key, allowed in _EXPRESSIBLE[family].items()
        if getattr(cfg, key) not in allowed
    ]
    if family in ("llama", "qwen3") and cfg.qkv_bias != cfg.out_bias:
        found.append(Problem("model.out_bias", f"{cfg.out_bias} must equal model.qkv_bias {cfg.qkv_bias} for export"))
    if family == "llama" and cfg.hidden % cfg.heads:
        found.append(Problem("model.heads", f"{cfg.heads} must divide model.hidden {cfg.hidden} for export"))
    if family == "gpt2" and cfg.kv_heads != cfg.heads:
        found.append(Problem("model.kv_heads", f"{cfg.kv_heads} must equal model.heads {cfg.heads} for export"))
    if family == "gpt2" and cfg.heads * (cfg.head_dim or 0) != cfg.hidden:
        size = f"{cfg.head_dim} × model.heads {cfg.heads}"
        found.append(Problem("model.head_dim", f"{size} must equal model.hidden {cfg.hidden} for export"))
    return found


def hf_family(cfg: ModelConfig) -> Family:
    """The family whose Hugging Face architecture expresses `cfg`: its own where possible, else the first that can.

    Raises:
        UserError: naming the keys in the way of its own family's architecture, if none can.
    """
    for family in (cfg.family, *ARCHITECTURES):
        if not _obstacles(cfg, family):
            return family
    raise UserError(*_obstacles(cfg, cfg.family))


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
    return common | (_gpt2_config(cfg) if family == "gpt2" else _llama_config(cfg, family))


def _llama_config(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    scaling = _rope_scaling(cfg.rope)
    config: dict[str, Any] = {
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": cfg.rope.theta, **(scaling or {"rope_type": "default"})},
        "attention_dropout": 0.0,
    }
    if family in ("llama", "qwen3"):
        config["attention_bias"] = cfg.qkv_bias
    if family == "llama":
        config["mlp_bias"] = cfg.ffn_bias
    if family == "mistral":
        config["sliding_window"] = cfg.window
    if family in ("qwen2", "qwen3"):
        kind = "full_attention" if cfg.window is None else "sliding_attention"
        config |= {
            "use_sliding_window": cfg.window is not None,
            "sliding_window": cfg.window,
            "max_window_layers": cfg.layers if cfg.window is None else 0,
            "layer_types": [kind] * cfg.layers,
        }
    return config


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    keys: tuple[str, ...] = ()
    if rope.scaling == "llama3":
        keys = ("low_freq_factor", "high_freq_factor")
    elif rope.scaling == "yarn":
        keys = ("beta_fast", "beta_slow", "attention_factor")
    if keys:
        scaling["original_max_position_embeddings"] = rope.original_positions
    return scaling | {key: getattr(rope, key) for key in keys if getattr(rope, key) is not None}


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
