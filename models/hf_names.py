"""Which Hugging Face tensor each of our parameters is, per family, as one table used in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configs.schema import ModelConfig
from .hf_config import hf_family

# Buffers that older checkpoints carry: constants that the model recomputes.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|(^|\.)attn\.(masked_)?bias)$")


@dataclass(frozen=True)
class Link:
    """One Hugging Face tensor: `parts` (name and shape) joined along dim 0, then transposed if `transposed`."""

    theirs: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        first = self.parts[0][1]
        joined = (sum(shape[0] for _, shape in self.parts), *first[1:])
        return joined[::-1] if self.transposed else joined

    def to_ours(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our parameters (views) out of the Hugging Face tensor."""
        joined = tensor.t() if self.transposed else tensor
        sizes = [shape[0] for _, shape in self.parts]
        yield from zip((name for name, _ in self.parts), joined.split(sizes), strict=True)

    def to_theirs(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The Hugging Face tensor, contiguous, out of our parameters."""
        tensors = [ours[name] for name, _ in self.parts]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (joined.t() if self.transposed else joined).contiguous()


def links(cfg: ModelConfig) -> list[Link]:
    """Every tensor of the Hugging Face model that expresses `cfg`.

    Raises:
        UserError: if no supported architecture expresses `cfg`.
    """
    return list(_gpt2_links(cfg) if hf_family(cfg) == "gpt2" else _llama_links(cfg))


def base_prefix(cfg: ModelConfig) -> str:
    """What precedes the names of all tensors but the head; a checkpoint of the bare backbone lacks it."""
    return "transformer." if hf_family(cfg) == "gpt2" else "model."


def is_buffer(name: str) -> bool:
    """Whether a Hugging Face tensor is a constant that is not read."""
    return bool(_BUFFERS.search(name))


def _linear(theirs: str, ours: str, shape: tuple[int, int], bias: bool) -> Iterator[Link]:
    yield Link(f"{theirs}.weight", ((f"{ours}.weight", shape),))
    if bias:
        yield Link(f"{theirs}.bias", ((f"{ours}.bias", shape[:1]),))


def _llama_links(cfg: ModelConfig) -> Iterator[Link]:
    """Llama, Mistral, Qwen 2 and Qwen 3: the same names, row-major (out, in) weights as ours."""
    vocab, head_dim, kv_heads = cfg.vocab or 0, cfg.head_dim or 0, cfg.kv_heads or 0
    hidden, query, key = cfg.hidden, cfg.heads * head_dim, kv_heads * head_dim
    yield Link("model.embed_tokens.weight", (("embed.weight", (vocab, hidden)),))
    for i in range(cfg.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, ffn = f"{ours}.attention", f"{ours}.ffn"
        yield Link(f"{theirs}.input_layernorm.weight", ((f"{ours}.attention_norm.weight", (hidden,)),))
        for letter, rows in (("q", query), ("k", key), ("v", key)):
            yield from _linear(
                f"{theirs}.self_attn.{letter}_proj", f"{attention}.{letter}", (rows, hidden), cfg.qkv_bias
            )
        yield from _linear(f"{theirs}.self_attn.o_proj", f"{attention}.out", (hidden, query), cfg.out_bias)
        if cfg.qk_norm:
            for letter in "qk":
                ours_norm = ((f"{attention}.{letter}_norm.weight", (head_dim,)),)
                yield Link(f"{theirs}.self_attn.{letter}_norm.weight", ours_norm)
        yield Link(f"{theirs}.post_attention_layernorm.weight", ((f"{ours}.ffn_norm.weight", (hidden,)),))
        for part in ("gate", "up"):
            yield from _linear(f"{theirs}.mlp.{part}_proj", f"{ffn}.{part}", (cfg.ffn, hidden), cfg.ffn_bias)
        yield from _linear(f"{theirs}.mlp.down_proj", f"{ffn}.down", (hidden, cfg.ffn), cfg.ffn_bias)
    yield Link("model.norm.weight", (("norm.weight", (hidden,)),))
    if not cfg.tied:
        yield Link("lm_head.weight", (("head.weight", (vocab, hidden)),))


def _conv1d(theirs: str, ours: tuple[str, ...], rows: int, columns: int) -> Iterator[Link]:
    """GPT-2's Conv1D holds (in, out) weights; `c_attn` joins query, key and value, `rows` each."""
    yield Link(f"{theirs}.weight", tuple((f"{name}.weight", (rows, columns)) for name in ours), transposed=True)
    yield Link(f"{theirs}.bias", tuple((f"{name}.bias", (rows,)) for name in ours))


def _layer_norm(theirs: str, ours: str, hidden: int) -> Iterator[Link]:
    for part in ("weight", "bias"):
        yield Link(f"{theirs}.{part}", ((f"{ours}.{part}", (hidden,)),))


def _gpt2_links(cfg: ModelConfig) -> Iterator[Link]:
    vocab, hidden = cfg.vocab or 0, cfg.hidden
    yield Link("transformer.wte.weight", (("embed.weight", (vocab, hidden)),))
    yield Link("transformer.wpe.weight", (("positions.weight", (cfg.max_positions or 0, hidden)),))
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
        yield Link("lm_head.weight", (("head.weight", (vocab, hidden)),))
