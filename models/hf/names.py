"""Which Hugging Face tensor each of our parameters is, per family, as one table used in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...configs.schema import ModelConfig
from .families import Family, hf_family
from .links import Joined, Link, Shape, Stacked

# Buffers that older checkpoints carry: constants that the model recomputes.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|(^|\.)attn\.(masked_)?bias)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FUSED = ".mlp.experts.gate_up_proj"


def links(cfg: ModelConfig, *, fused: bool = False) -> list[Link]:
    """Every tensor of the Hugging Face model that expresses `cfg`.

    Args:
        cfg: resolved model configuration.
        fused: the experts of a layer are in one tensor per matrix, as transformers 5 holds them in memory, and not in
            one per expert, as checkpoints are published.

    Raises:
        UserError: if no supported architecture expresses `cfg`.
    """
    family = hf_family(cfg)
    return list(_gpt2_links(cfg) if family == "gpt2" else _decoder_links(cfg, family, fused))


def is_fused(cfg: ModelConfig, names: Mapping[str, object]) -> bool:
    """Whether a folder with tensors of these names holds the experts of a layer together."""
    return bool(cfg.moe.experts) and any(name.endswith(_FUSED) for name in names)


def base_prefix(cfg: ModelConfig) -> str:
    """What precedes the names of all tensors but the head; a checkpoint of the bare backbone lacks it."""
    return "transformer." if hf_family(cfg) == "gpt2" else "model."


def is_buffer(name: str) -> bool:
    """Whether a Hugging Face tensor is a constant that is not read."""
    return bool(_BUFFERS.search(name))


def is_prediction_module(cfg: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to DeepSeek-V3's modules for multi-token prediction, stored as further layers."""
    layer = _LAYER.match(name)
    return cfg.family == "deepseek_v3" and layer is not None and int(layer[1]) >= cfg.layers


def _one(theirs: str, ours: str, shape: Shape) -> Link:
    return Joined(theirs, ((ours, shape),))


def _linear(theirs: str, ours: str, shape: tuple[int, int], bias: bool = False) -> Iterator[Link]:
    yield _one(f"{theirs}.weight", f"{ours}.weight", shape)
    if bias:
        yield _one(f"{theirs}.bias", f"{ours}.bias", shape[:1])


def _decoder_links(cfg: ModelConfig, family: Family, fused: bool) -> Iterator[Link]:
    """All but GPT-2: row-major (out, in) weights as ours."""
    vocab, hidden, routed = cfg.vocab or 0, cfg.hidden, set(cfg.moe_layers)
    yield _one("model.embed_tokens.weight", "embed.weight", (vocab, hidden))
    for i in range(cfg.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield _one(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", (hidden,))
        attention = _latent_links if cfg.mla.kv_rank else _attention_links
        yield from attention(cfg, f"{theirs}.self_attn", f"{ours}.attention")
        yield _one(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight", (hidden,))
        if i in routed:
            yield from _moe_links(cfg, _SPELLINGS[family], theirs, f"{ours}.moe", fused)
        else:
            yield from _ffn_links(cfg, f"{theirs}.mlp", f"{ours}.ffn", cfg.ffn)
    yield _one("model.norm.weight", "norm.weight", (hidden,))
    if not cfg.tied:
        yield _one("lm_head.weight", "head.weight", (vocab, hidden))


def _attention_links(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Link]:
    head_dim, kv_heads = cfg.head_dim or 0, cfg.kv_heads or 0
    hidden, query, key = cfg.hidden, cfg.heads * head_dim, kv_heads * head_dim
    for letter, rows in (("q", query), ("k", key), ("v", key)):
        yield from _linear(f"{theirs}.{letter}_proj", f"{ours}.{letter}", (rows, hidden), cfg.qkv_bias)
    yield from _linear(f"{theirs}.o_proj", f"{ours}.out", (hidden, query), cfg.out_bias)
    if cfg.qk_norm:
        for letter, width in (("q", query), ("k", key)):
            shape = (width if cfg.qk_norm_whole else head_dim,)
            yield _one(f"{theirs}.{letter}_norm.weight", f"{ours}.{letter}_norm.weight", shape)
    if cfg.sinks:
        yield _one(f"{theirs}.sinks", f"{ours}.sinks", (cfg.heads,))


def _latent_links(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Link]:
    mla, hidden = cfg.mla, cfg.hidden
    query = cfg.heads * (mla.nope_dim + mla.rope_dim)
    if mla.q_rank is None:
        yield from _linear(f"{theirs}.q_proj", f"{ours}.q", (query, hidden))
    else:
        yield from _linear(f"{theirs}.q_a_proj", f"{ours}.q_down", (mla.q_rank, hidden), cfg.qkv_bias)
        yield _one(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_norm.weight", (mla.q_rank,))
        yield from _linear(f"{theirs}.q_b_proj", f"{ours}.q_up", (query, mla.q_rank))
    low = mla.kv_rank + mla.rope_dim
    yield from _linear(f"{theirs}.kv_a_proj_with_mqa", f"{ours}.kv_down", (low, hidden), cfg.qkv_bias)
    yield _one(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight", (mla.kv_rank,))
    expanded = cfg.heads * (mla.nope_dim + mla.value_dim)
    yield from _linear(f"{theirs}.kv_b_proj", f"{ours}.kv_up", (expanded, mla.kv_rank))
    yield from _linear(f"{theirs}.o_proj", f"{ours}.out", (hidden, cfg.heads * mla.value_dim), cfg.out_bias)


def _ffn_links(cfg: ModelConfig, theirs: str, ours: str, width: int) -> Iterator[Link]:
    for part in ("gate", "up"):
        yield from _linear(f"{theirs}.{part}_proj", f"{ours}.{part}", (width, cfg.hidden), cfg.ffn_bias)
    yield from _linear(f"{theirs}.down_proj", f"{ours}.down", (cfg.hidden, width), cfg.ffn_bias)


@dataclass(frozen=True)
class _Spelling:
    """What a family calls the parts of its mixture-of-experts layer, behind `model.layers.N.`."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"


_SPELLINGS: dict[Family, _Spelling] = {
    "mixtral": _Spelling("block_sparse_moe", gate="w1", up="w3", down="w2"),
    "qwen2_moe": _Spelling(),
    "qwen3_moe": _Spelling(),
    "olmoe": _Spelling(),
    "deepseek_v2": _Spelling(shared="shared_experts"),
    "deepseek_v3": _Spelling(shared="shared_experts"),
    "gpt_oss": _Spelling(router="router"),
}


def _moe_links(cfg: ModelConfig, names: _Spelling, layer: str, ours: str, fused: bool) -> Iterator[Link]:
    moe, hidden = cfg.moe, cfg.hidden
    gpt_oss = names.router == "router"
    theirs = f"{layer}.{'mlp' if fused else names.block}"
    router = f"{theirs}.{names.router}"
    yield from _linear(router, f"{ours}.router", (moe.experts, hidden), moe.router.logit_bias)
    if moe.router.selection_bias:
        yield _one(f"{router}.e_score_correction_bias", f"{ours}.router.selection_bias", (moe.experts,))
    width = moe.ffn or cfg.ffn
    gate, up, down = (f"{ours}.experts.{part}.weight" for part in ("gate", "up", "down"))
    wide, narrow = (moe.experts, width, hidden), (moe.experts, hidden, width)
    if gpt_oss:
        yield from _gpt_oss_experts(cfg, f"{theirs}.experts", f"{ours}.experts", width)
    elif fused:
        yield Joined(f"{theirs}.experts.gate_up_proj", ((gate, wide), (up, wide)), dim=1)
        yield _one(f"{theirs}.experts.down_proj", down, narrow)
    else:
        for name, mine, shape in ((names.gate, gate, wide), (names.up, up, wide), (names.down, down, narrow)):
            one_by_one = tuple(f"{theirs}.experts.{e}.{name}.weight" for e in range(moe.experts))
            yield Stacked(one_by_one, mine, shape)
    if moe.shared:
        yield from _ffn_links(cfg, f"{theirs}.{names.shared}", f"{ours}.shared", moe.shared)
    if moe.shared and moe.shared_gate:
        yield from _linear(f"{theirs}.{names.shared}_gate", f"{ours}.shared_gate", (1, hidden))


def _gpt_oss_experts(cfg: ModelConfig, theirs: str, ours: str, width: int) -> Iterator[Link]:
    """GPT-OSS holds (in, out) weights of all experts together, rows of gate and up in turn."""
    experts, hidden = cfg.moe.experts, cfg.hidden
    pair = [f"{ours}.{part}" for part in ("gate", "up")]
    weights = tuple((f"{name}.weight", (experts, width, hidden)) for name in pair)
    biases = tuple((f"{name}.bias", (experts, width)) for name in pair)
    yield Joined(f"{theirs}.gate_up_proj", weights, transposed=True, dim=1, interleaved=True)
    yield Joined(f"{theirs}.gate_up_proj_bias", biases, dim=1, interleaved=True)
    yield Joined(f"{theirs}.down_proj", ((f"{ours}.down.weight", (experts, hidden, width)),), transposed=True)
    yield _one(f"{theirs}.down_proj_bias", f"{ours}.down.bias", (experts, hidden))


def _conv1d(theirs: str, ours: tuple[str, ...], rows: int, columns: int) -> Iterator[Link]:
    """GPT-2's Conv1D holds (in, out) weights; `c_attn` joins query, key and value, `rows` each."""
    yield Joined(f"{theirs}.weight", tuple((f"{name}.weight", (rows, columns)) for name in ours), transposed=True)
    yield Joined(f"{theirs}.bias", tuple((f"{name}.bias", (rows,)) for name in ours))


def _layer_norm(theirs: str, ours: str, hidden: int) -> Iterator[Link]:
    for part in ("weight", "bias"):
        yield _one(f"{theirs}.{part}", f"{ours}.{part}", (hidden,))


def _gpt2_links(cfg: ModelConfig) -> Iterator[Link]:
    vocab, hidden = cfg.vocab or 0, cfg.hidden
    yield _one("transformer.wte.weight", "embed.weight", (vocab, hidden))
    yield _one("transformer.wpe.weight", "positions.weight", (cfg.max_positions or 0, hidden))
    for i in range(cfg.layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        qkv = tuple(f"{ours}.attention.{letter}" for letter in "qkv")
        yield from _layer_norm(f"{theirs}.ln_1", f"{ours}.attention_norm", hidden)
        yield from _conv1d(f"{theirs}.attn.c_attn", qkv, hidden, hidden)
        yield from _conv1d(f"{theirs}.attn.c_proj", (f"{ours}.attention.out",), hidden, hidden)
        yield from _layer_norm(f"{theirs}.ln_2", f"{ours}.ffn_norm", hidden)
        yield from _conv1d(f"{theirs}.mlp.c_fc", (f"{ours}.ffn.up",), cfg.ffn, hidden)
        yield from _conv1d(f"{theirs}.mlp.c_proj", (f"{ours}.ffn.down",), hidden, cfg.ffn)
    yield from _layer_norm("transformer.ln_f", "norm", hidden)
    if not cfg.tied:
        yield _one("lm_head.weight", "head.weight", (vocab, hidden))
