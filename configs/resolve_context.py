"""Which method of context parallelism a job uses where it does not say."""

from __future__ import annotations

from dataclasses import replace

from .schema_model import ModelConfig
from .schema_parallel import ContextConfig, ParallelConfig


def resolve_context(parallel: ParallelConfig, model: ModelConfig) -> ContextConfig:
    """The context section with method, inner and placement filled in.

    Per rank and pass Ulysses sends (P − 1) / P · 2 (H + K) · d numbers a token and a ring 2 (P − 1) · K · d · 3/4, so
    with P ranks and H / K = g query heads per key-value head Ulysses sends less from 3/4 · P > 1 + g on. Latent
    attention has one narrow vector a token to gather, a few per cent of its keys and values.
    """
    context, cp = parallel.context, parallel.cp
    linear = bool(model.linear_layers)
    placement = context.placement or ("contiguous" if linear else "zigzag")
    if cp <= 1 or model.kv_heads is None or model.heads < 1 or model.kv_heads < 1:
        return replace(context, placement=placement)
    heads, kv_heads = max(1, model.heads // parallel.tp), max(1, model.kv_heads // parallel.tp)
    method = context.method
    if method == "auto":
        # Only what travels from rank to rank can pass those by that have no use for it.
        cheapest = "allgather" if model.mla.kv_rank else _cheapest(cp, heads, kv_heads, linear=linear)
        method = "ring" if placement == "by_length" else cheapest
    inner = context.inner
    if inner is None and method == "usp":
        inner = _largest_inner(cp, heads, kv_heads)
    return replace(context, method=method, inner=inner, placement=placement)


def divides(cp: int, heads: int, kv_heads: int) -> bool:
    """Whether heads can be exchanged over so many ranks; key-value heads may be copied."""
    return heads % cp == 0 and (kv_heads % cp == 0 or cp % kv_heads == 0)


def _cheapest(cp: int, heads: int, kv_heads: int, *, linear: bool) -> str:
    exchange = divides(cp, heads, kv_heads)
    if linear:
        return "ulysses" if exchange else "allgather"
    if exchange and 0.75 * cp > 1 + heads / kv_heads:
        return "ulysses"
    return "ring"


def _largest_inner(cp: int, heads: int, kv_heads: int) -> int:
    """The largest part of cp whose ranks can exchange heads without copies, or else 1."""
    return max(size for size in range(1, cp + 1) if cp % size == 0 and heads % size == 0 and kv_heads % size == 0)
