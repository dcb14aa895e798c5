"""A family from outside Pentad, as its owner would write it (Llama's maths under other names), a schedule, a metric.

Query, key and value are in one tensor, the feed-forward network's last matrix is transposed, and norms are stored
doubled. An epsilon has a key of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pentad.configs import ModelConfig
from pentad.models.hf.decoder import read_decoder, read_heads, write_decoder
from pentad.models.hf.expressible import DENSE, FALSE, each, without_window
from pentad.models.hf.families import Family, register
from pentad.models.hf.links import Joined, Link, Read
from pentad.models.hf.names import one
from pentad.models.hf.reader import Reader
from pentad.parallel.global_tensor import Placement
from pentad.parallel.pipeline.schedules import Orders, Schedule, Shape
from pentad.parallel.pipeline.schedules import register as register_schedule
from pentad.parallel.pipeline.schedules.base import backward, forward
from pentad.trainer.metrics.readings import Metric, Reading, StepDone
from pentad.trainer.metrics.readings import register as register_reading


@dataclass(frozen=True)
class Doubled:
    """A vector that is stored as twice its value."""

    name: str
    ours_name: str
    size: int

    @property
    def ours(self) -> dict[str, tuple[int, ...]]:
        return {self.ours_name: (self.size,)}

    @property
    def theirs(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.size,)}

    def to_ours(self, name: str, placement: Placement, read: Read) -> Tensor:
        at, size = placement.offsets[0], placement.local_shape[0]
        return read(self.name, (slice(at, at + size),)) / 2

    def to_theirs(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield self.name, ours[self.ours_name] * 2


def _links(cfg: ModelConfig, fused: bool) -> Iterator[Link]:
    vocab, hidden, width = cfg.vocab or 0, cfg.hidden, cfg.head_dim or 0
    query, key = cfg.heads * width, (cfg.kv_heads or 0) * width
    yield one("acorn.embed", "embed.weight", (vocab, hidden))
    for i in range(cfg.layers):
        ours, theirs = f"layers.{i}", f"acorn.blocks.{i}"
        rows = (("q", query), ("k", key), ("v", key))
        qkv = tuple((f"{ours}.attention.{letter}.weight", (count, hidden)) for letter, count in rows)
        yield Doubled(f"{theirs}.norm1", f"{ours}.attention_norm.weight", hidden)
        yield Joined(f"{theirs}.qkv", qkv)
        yield one(f"{theirs}.out", f"{ours}.attention.out.weight", (hidden, query))
        yield Doubled(f"{theirs}.norm2", f"{ours}.ffn_norm.weight", hidden)
        yield one(f"{theirs}.gate", f"{ours}.ffn.gate.weight", (cfg.ffn, hidden))
        yield one(f"{theirs}.up", f"{ours}.ffn.up.weight", (cfg.ffn, hidden))
        yield Joined(f"{theirs}.down", ((f"{ours}.ffn.down.weight", (hidden, cfg.ffn)),), transposed=True)
    yield Doubled("acorn.norm", "norm.weight", hidden)
    yield one("lm_head.weight", "head.weight", (vocab, hidden))


def _read(reader: Reader) -> dict[str, Any]:
    return {**read_decoder(reader), **read_heads(reader), "norm_eps": reader.number("acorn_eps")}


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(cfg), "rms_norm_eps": 1.0, "head_dim": cfg.head_dim, "acorn_eps": cfg.norm_eps}


register(
    Family(
        name="acorn",
        text="made up for a test",
        architecture="AcornForCausalLM",
        defaults={"norm_eps": 0.001, "rope": {"theta": 500.0}, "kv_heads": 2},
        absent={"hidden_act": "silu", "rms_norm_eps": 1.0},
        read=_read,
        write=_write,
        links=_links,
        backbone="acorn.",
        values={**DENSE, **each("qkv_bias out_bias ffn_bias tied", FALSE)},
        checks=(without_window,),
    )
)


@register_schedule(
    Schedule(name="newest-first", text="all forward passes, then the backward passes of the newest first")
)
def newest_first(shape: Shape) -> Orders:
    mbs = range(shape.microbatches)
    return tuple(
        (*(forward(i, rank) for i in mbs), *(backward(i, rank) for i in reversed(mbs))) for rank in range(shape.ranks)
    )


@register_reading
class Perplexity(Reading):
    metrics = (Metric("perplexity", "e to the loss"),)

    def step(self, done: StepDone) -> dict[str, float]:
        return {"perplexity": math.exp(done.loss)}
