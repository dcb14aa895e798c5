"""What an architecture can express: the values that it has, by key of `model`, and checks of several keys together.

A check is a function of the configuration and the architecture's name, for its messages. No family is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...configs.errors import Problem
from ...configs.fields import value_of
from ...configs.schema import ModelConfig

Allowed = Mapping[str, tuple[Any, ...]]
"""The values of a key; keys that are not named are free."""
Check = Callable[[ModelConfig, str], list[Problem]]

FALSE, TRUE, BOTH = (False,), (True,), (False, True)


def each(keys: str, allowed: tuple[Any, ...]) -> Allowed:
    """The same values for several keys, written with spaces between."""
    return dict.fromkeys(keys.split(), allowed)


PLAIN: Allowed = {
    **each("norm", ("rms",)),
    **each("position", ("rope",)),
    **each("activation", ("swiglu",)),
    **each("qk_norm qk_norm_whole sinks rope.interleaved", FALSE),
    **each("mla.kv_rank mtp", (0,)),
    **each("attention_every", (1,)),
    **each("rope.score_factor", (1.0,)),
}
"""Llama's layer."""
DENSE: Allowed = {**PLAIN, **each("moe.experts", (0,))}
"""Without experts."""
ROUTED: Allowed = {
    **PLAIN,
    **each("qkv_bias out_bias ffn_bias moe.bias", FALSE),
    **each("moe.router.name", ("top_k",)),
    **each("moe.router.score", ("softmax",)),
    **each("moe.router.scale", (1.0,)),
    **each("moe.router.groups", (1,)),
    **each("moe.router.logit_bias moe.router.selection_bias", FALSE),
    **each("moe.router.null_experts moe.shared", (0,)),
}
"""With experts, none of them shared."""


def value_obstacles(cfg: ModelConfig, allowed: Allowed, name: str) -> list[Problem]:
    """The keys whose values the architecture `name` does not have."""
    return [
        Problem(f"model.{key}", f"{value_of(cfg, key)} cannot be exported as {name}")
        for key, values in allowed.items()
        if value_of(cfg, key) not in values
    ]


def no_linear_attention(cfg: ModelConfig, name: str) -> list[Problem]:
    """Softmax attention in all layers."""
    if not cfg.linear_layers:
        return []
    message = f"{cfg.attention_every}: linear attention cannot be exported as {name}"
    return [Problem("model.attention_every", message)]


def one_attention_bias(cfg: ModelConfig, name: str) -> list[Problem]:
    """One key for the biases of all four projections of attention."""
    if cfg.qkv_bias == cfg.out_bias:
        return []
    return [Problem("model.out_bias", f"{cfg.out_bias} must equal model.qkv_bias {cfg.qkv_bias} for export")]


def heads_divide_hidden(cfg: ModelConfig, name: str) -> list[Problem]:
    """The architecture's code insists on it, whatever `head_dim` says."""
    if cfg.hidden % cfg.heads == 0:
        return []
    return [Problem("model.heads", f"{cfg.heads} must divide model.hidden {cfg.hidden} for export")]


def all_key_heads(cfg: ModelConfig, name: str) -> list[Problem]:
    """As many key heads as query heads."""
    if cfg.kv_heads == cfg.heads:
        return []
    return [Problem("model.kv_heads", f"{cfg.kv_heads} must equal model.heads {cfg.heads} for export")]


def heads_fill_hidden(cfg: ModelConfig, name: str) -> list[Problem]:
    """There is no key for the width of a head."""
    if cfg.heads * cfg.head_dim == cfg.hidden:
        return []
    size = f"{cfg.head_dim} × model.heads {cfg.heads}"
    return [Problem("model.head_dim", f"{size} must equal model.hidden {cfg.hidden} for export")]


def without_window(cfg: ModelConfig, name: str) -> list[Problem]:
    """Every layer sees everything."""
    return [] if cfg.window is None else [Problem("model.window", f"{cfg.window} cannot be exported as {name}")]


def window_everywhere(cfg: ModelConfig, name: str) -> list[Problem]:
    """A window holds in all layers."""
    if cfg.window is None or cfg.window_every == 1:
        return []
    return [Problem("model.window_every", f"{cfg.window_every} cannot be exported as {name}")]


def with_experts(cfg: ModelConfig, name: str) -> list[Problem]:
    """Some layers have experts."""
    return [] if cfg.moe.experts else [Problem("model.moe.experts", f"0 cannot be exported as {name}")]


def experts_everywhere(cfg: ModelConfig, name: str) -> list[Problem]:
    """All layers have experts."""
    if not cfg.moe.experts or len(cfg.moe_layers) == cfg.layers:
        return []
    return [Problem("model.moe.dense_layers", f"{name} has experts in all layers")]


def with_shared_expert(cfg: ModelConfig, name: str) -> list[Problem]:
    """Layers with experts have a shared one."""
    if not cfg.moe.experts or cfg.moe.shared:
        return []
    return [Problem("model.moe.shared", f"0 cannot be exported as {name}")]
