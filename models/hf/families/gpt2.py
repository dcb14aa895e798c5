"""GPT-2: LayerNorm, learned positions, biases everywhere; transposed weights, query, key and value in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....configs.schema import ModelConfig
from ..expressible import FALSE, TRUE, all_key_heads, each, heads_fill_hidden, without_window
from ..links import Joined, Link
from ..names import one
from ..reader import Reader
from .family import Family

_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def _read(reader: Reader) -> dict[str, Any]:
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
        "activation": _GELUS.get(str(reader.value("activation_function")), "gelu"),
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
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


def _links(cfg: ModelConfig, fused: bool) -> Iterator[Link]:
    vocab, hidden = cfg.vocab, cfg.hidden
    yield one("transformer.wte.weight", "embed.weight", (vocab, hidden))
    yield one("transformer.wpe.weight", "positions.weight", (cfg.max_positions, hidden))
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
        yield one("lm_head.weight", "head.weight", (vocab, hidden))


def _conv1d(theirs: str, ours: tuple[str, ...], rows: int, columns: int) -> Iterator[Link]:
    """GPT-2's Conv1D holds (in, out) weights; `c_attn` joins query, key and value, `rows` each."""
    yield Joined(f"{theirs}.weight", tuple((f"{name}.weight", (rows, columns)) for name in ours), transposed=True)
    yield Joined(f"{theirs}.bias", tuple((f"{name}.bias", (rows,)) for name in ours))


def _layer_norm(theirs: str, ours: str, hidden: int) -> Iterator[Link]:
    for part in ("weight", "bias"):
        yield one(f"{theirs}.{part}", f"{ours}.{part}", (hidden,))


FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    absent={
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
    },
    read=_read,
    write=_write,
    links=_links,
    backbone="transformer.",
    values={
        **each("norm", ("layer",)),
        **each("position", ("learned",)),
        **each("activation", ("gelu", "gelu_tanh")),
        **each("qk_norm sinks", FALSE),
        **each("mla.kv_rank moe.experts mtp", (0,)),
        **each("attention_every", (1,)),
        **each("qkv_bias out_bias ffn_bias", TRUE),
    },
    checks=(all_key_heads, heads_fill_hidden, without_window),
)
