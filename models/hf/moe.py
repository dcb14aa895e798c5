"""The parts of config.json about experts, both ways; no family is named here."""

from __future__ import annotations

from typing import Any

from ...configs.schema import ModelConfig, MoeConfig, RouterConfig
from .reader import Reader

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""The same under transformers' different names, which also depend on its version."""


def read_moe(reader: Reader, *, width: int, router: RouterConfig, **fields: Any) -> dict[str, Any]:
    """The key `moe` of ModelConfig.

    Args:
        reader: of config.json.
        width: inner width of an expert.
        router: how tokens are routed.
        fields: further keys of MoeConfig.
    """
    experts = read_experts(reader)
    top_k = reader.integer("num_experts_per_tok")
    if top_k > experts:
        reader.problem("num_experts_per_tok", f"{top_k} is more than the {experts} experts")
    return {"moe": MoeConfig(experts=experts, top_k=top_k, ffn=width, router=router, **fields)}


def read_experts(reader: Reader) -> int:
    """How many experts a layer has."""
    return reader.integer(reader.first(*_EXPERTS))


def read_router(reader: Reader, **fields: Any) -> RouterConfig:
    """The router: a softmax over all experts whose weights are divided by their sum if `norm_topk_prob` says so.

    Args:
        reader: of config.json.
        fields: keys of RouterConfig in which the family's router differs.
    """
    loss = reader.first("router_aux_loss_coef", "aux_loss_alpha")
    values: dict[str, Any] = {
        "normalize": bool(reader.value("norm_topk_prob")),
        "groups_kept": 1,
        "aux_loss": float(reader.number(loss, zero=True)) if reader.value(loss) is not None else 0.0,
        "aux_level": "sequence" if reader.value("seq_aux") else "micro_batch",
    }
    return RouterConfig(**values | fields)


def write_moe(cfg: ModelConfig, experts: str) -> dict[str, Any]:
    """Number of experts, under the name `experts`, and what else all architectures have."""
    return {
        experts: cfg.moe.experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "router_aux_loss_coef": cfg.moe.router.aux_loss,
    }


def read_sparse_layers(reader: Reader) -> dict[str, Any]:
    """Which layers have experts, as Qwen says it: every so many-th one, and a list of exceptions."""
    layers = reader.integer("num_hidden_layers")
    step, dense = reader.integer("decoder_sparse_step"), set(reader.listed("mlp_only_layers"))
    sparse = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    candidates = [(first, every) for every in (step, *range(1, layers + 1)) for first in range(layers)]
    for first, every in candidates:
        if sparse and sparse == [i for i in range(first, layers) if (i - first + 1) % every == 0]:
            return {"dense_layers": first, "every": every}
    key = "mlp_only_layers" if dense else "decoder_sparse_step"
    message = "layers with experts must be every n-th one after dense first layers"
    reader.problem(key, f"{reader.value(key)!r} is not supported; {message}, found {sparse} of {layers}")
    return {}


def write_sparse_layers(cfg: ModelConfig) -> dict[str, Any]:
    """As `read_sparse_layers` reads it."""
    first, every = cfg.moe.dense_layers, cfg.moe.every
    if first % every == 0:
        return {"decoder_sparse_step": every, "mlp_only_layers": list(range(first))}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(cfg.layers) if i not in cfg.moe_layers]}
