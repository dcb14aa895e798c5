"""Which tensor of a Hugging Face folder each of our parameters is, as tables used in both directions.

Here is what decoders after Llama's model share; a family gives the names in which it differs, or a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...configs.schema import ModelConfig
from .links import Joined, Link, Shape, Stacked

ExpertLinks = Callable[[ModelConfig, str, str, bool], Iterator[Link]]
"""A layer's experts: configuration, their prefix and ours of the layer, and whether they are in one tensor per matrix
(as transformers 5 holds them in memory) → the tensors."""


def one(theirs: str, ours: str, shape: Shape) -> Link:
    """The same tensor under two names."""
    return Joined(theirs, ((ours, shape),))


def linear(theirs: str, ours: str, shape: tuple[int, int], bias: bool = False) -> Iterator[Link]:
    """Weight (out, in) and bias of a projection."""
    yield one(f"{theirs}.weight", f"{ours}.weight", shape)
    if bias:
        yield one(f"{theirs}.bias", f"{ours}.bias", shape[:1])


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the parts of its mixture-of-experts layer, behind `model.layers.N.`."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"


def expert_links(
    cfg: ModelConfig, layer: str, ours: str, fused: bool, *, names: ExpertNames = ExpertNames()
) -> Iterator[Link]:
    """Router and experts, one tensor per expert as checkpoints are published, or per matrix if `fused`."""
    moe, hidden = cfg.moe, cfg.hidden
    theirs = f"{layer}.{'mlp' if fused else names.block}"
    yield from router_links(cfg, f"{theirs}.gate", ours)
    width = moe.ffn
    gate, up, down = (f"{ours}.experts.{part}.weight" for part in ("gate", "up", "down"))
    wide, narrow = (moe.experts, width, hidden), (moe.experts, hidden, width)
    if fused:
        yield Joined(f"{theirs}.experts.gate_up_proj", ((gate, wide), (up, wide)), dim=1)
        yield one(f"{theirs}.experts.down_proj", down, narrow)
    else:
        for name, mine, shape in ((names.gate, gate, wide), (names.up, up, wide), (names.down, down, narrow)):
            one_by_one = tuple(f"{theirs}.experts.{e}.{name}.weight" for e in range(moe.experts))
            yield Stacked(one_by_one, mine, shape)
    if moe.shared:
        yield from feed_forward_links(cfg, f"{theirs}.{names.shared}", f"{ours}.shared", moe.shared)
    if moe.shared and moe.shared_gate:
        yield from linear(f"{theirs}.{names.shared}_gate", f"{ours}.shared_gate", (1, hidden))


def router_links(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Link]:
    """The router's matrix and its biases; `ours` is the prefix of the layer's experts."""
    moe = cfg.moe
    yield from linear(theirs, f"{ours}.router", (moe.experts, cfg.hidden), moe.router.logit_bias)
    if moe.router.selection_bias:
        yield one(f"{theirs}.e_score_correction_bias", f"{ours}.router.selection_bias", (moe.experts,))


def decoder_links(cfg: ModelConfig, fused: bool = False, *, experts: ExpertLinks = expert_links) -> Iterator[Link]:
    """Every tensor of a decoder with row-major (out, in) weights, as ours are.

    Args:
        cfg: resolved.
        fused: a layer's experts are in one tensor per matrix.
        experts: the experts' tensors.
    """
    vocab, hidden, routed = cfg.vocab, cfg.hidden, set(cfg.moe_layers)
    yield one("model.embed_tokens.weight", "embed.weight", (vocab, hidden))
    for i in range(cfg.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield one(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", (hidden,))
        attention = latent_links if cfg.mla.kv_rank else attention_links
        yield from attention(cfg, f"{theirs}.self_attn", f"{ours}.attention")
        yield one(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight", (hidden,))
        if i in routed:
            yield from experts(cfg, theirs, f"{ours}.moe", fused)
        else:
            yield from feed_forward_links(cfg, f"{theirs}.mlp", f"{ours}.ffn", cfg.ffn)
    yield one("model.norm.weight", "norm.weight", (hidden,))
    if not cfg.tied:
        yield one("lm_head.weight", "head.weight", (vocab, hidden))


def attention_links(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Link]:
    """Projections, norms and sinks of an attention layer."""
    head_dim, kv_heads = cfg.head_dim, cfg.kv_heads
    hidden, query, key = cfg.hidden, cfg.heads * head_dim, kv_heads * head_dim
    for letter, rows in (("q", query), ("k", key), ("v", key)):
        yield from linear(f"{theirs}.{letter}_proj", f"{ours}.{letter}", (rows, hidden), cfg.qkv_bias)
    yield from linear(f"{theirs}.o_proj", f"{ours}.out", (hidden, query), cfg.out_bias)
    if cfg.qk_norm:
        for letter, width in (("q", query), ("k", key)):
            shape = (width if cfg.qk_norm_whole else head_dim,)
            yield one(f"{theirs}.{letter}_norm.weight", f"{ours}.{letter}_norm.weight", shape)
    if cfg.sinks:
        yield one(f"{theirs}.sinks", f"{ours}.sinks", (cfg.heads,))


def latent_links(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Link]:
    """The same with latent attention."""
    mla, hidden = cfg.mla, cfg.hidden
    query = cfg.heads * (mla.nope_dim + mla.rope_dim)
    if mla.q_rank is None:
        yield from linear(f"{theirs}.q_proj", f"{ours}.q", (query, hidden))
    else:
        yield from linear(f"{theirs}.q_a_proj", f"{ours}.q_down", (mla.q_rank, hidden), cfg.qkv_bias)
        yield one(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_norm.weight", (mla.q_rank,))
        yield from linear(f"{theirs}.q_b_proj", f"{ours}.q_up", (query, mla.q_rank))
    low = mla.kv_rank + mla.rope_dim
    yield from linear(f"{theirs}.kv_a_proj_with_mqa", f"{ours}.kv_down", (low, hidden), cfg.qkv_bias)
    yield one(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight", (mla.kv_rank,))
    expanded = cfg.heads * (mla.nope_dim + mla.value_dim)
    yield from linear(f"{theirs}.kv_b_proj", f"{ours}.kv_up", (expanded, mla.kv_rank))
    yield from linear(f"{theirs}.o_proj", f"{ours}.out", (hidden, cfg.heads * mla.value_dim), cfg.out_bias)


def feed_forward_links(cfg: ModelConfig, theirs: str, ours: str, width: int) -> Iterator[Link]:
    """A gated feed-forward network."""
    for part in ("gate", "up"):
        yield from linear(f"{theirs}.{part}_proj", f"{ours}.{part}", (width, cfg.hidden), cfg.ffn_bias)
    yield from linear(f"{theirs}.down_proj", f"{ours}.down", (cfg.hidden, width), cfg.ffn_bias)
