"""The attention half of a layer, forward and backward (`models.attention`, `models.mla`, `models.linear_attention`)."""

from __future__ import annotations

from dataclasses import replace

from . import cores
from .projections import column_backward, column_forward, norm_backward, norm_forward, row_backward, row_forward
from .tape import Tape
from .ways import Bench

_RAW = "queries and keys before their norm"


def softmax_forward(t: Tape, b: Bench, out: str) -> None:
    """The rows of `activations._attention`, and the result."""
    m, q, kv = b.model, b.tokens(b.w.q), b.tokens(b.w.kv)
    column_forward(t, b, {"queries": q, "keys": kv, "values": kv})
    if m.qk_norm:
        t.free("queries", "keys")
        t.make(_RAW, q + kv)
        t.make("queries", q)
        t.make("keys", kv)
    if m.position == "rope":
        # Both are turned before either is let go.
        t.bump(q + kv)
    cores.core_forward(t, b)
    row_forward(t, b, out)
    t.free("own queries", "own keys", "own values")


def softmax_backward(t: Tape, b: Bench, dx: str, *, later: bool = False) -> None:
    """From the stream's gradient to that of the norm's output."""
    m, q, kv = b.model, b.tokens(b.w.q), b.tokens(b.w.kv)
    row_backward(t, b, "d attention output", b.tokens(b.w.value), features=b.w.value, later=later)
    cores.core_backward(t, b)
    # Turned back, then brought into the order of the tokens.
    t.bump(max(q, kv))
    if m.qk_norm:
        t.bump((3 if not b.half else 1) * max(q, kv) + b.chunk(q, 3))
        t.free(_RAW)
    grads = {"d queries": q, "d keys": kv, "d values": kv}
    column_backward(t, b, grads, dx, features=b.w.q, later=later)


def latent_forward(t: Tape, b: Bench, out: str) -> None:
    """The rows of `activations._latent_attention`, and the result."""
    mla, n, e, w = b.model.mla, b.work.stream, b.work.width, b.w
    low = n * (mla.kv_rank + mla.rope_dim) * e
    if mla.q_rank:
        t.make("narrow queries", n * mla.q_rank * e)
        t.make("latents", low)
        norm_forward(t, b, "narrow queries normed", n * mla.q_rank * e)
        column_forward(t, _narrow(b, mla.q_rank), {"queries": b.tokens(w.q)})
    else:
        column_forward(t, b, {"queries": b.tokens(w.q)})
        t.make("latents", low)
    norm_forward(t, b, "latents normed", n * mla.kv_rank * e)
    turning = b.tokens(mla.rope_dim)
    t.make("turned keys", turning)
    if b.model.position == "rope":
        t.bump(b.tokens(w.q) + turning)
    if b.work.latents:
        cores.core_forward(t, b)
    else:
        expanded = b.tokens(w.heads * (mla.nope_dim + mla.value_dim))
        column_forward(t, _narrow(b, mla.kv_rank), {"keys and values": expanded})
        t.make("keys", b.tokens(w.q))
        if b.work.exchanged > 1:
            t.live["values"] = t.live.pop("keys and values")
        cores.core_forward(t, b)
        t.free("turned keys")
    row_forward(t, b, out)
    t.free("own queries", "own keys", "own values")


def latent_backward(t: Tape, b: Bench, dx: str, *, later: bool = False) -> None:
    """From the stream's gradient to that of the norm's output."""
    mla, n, e, w = b.model.mla, b.work.stream, b.work.width, b.w
    row_backward(t, b, "d attention output", b.tokens(w.value), features=w.value, later=later)
    cores.core_backward(t, b)
    q, width = b.tokens(w.q), w.heads * (mla.nope_dim + mla.value_dim)
    latents = n * mla.kv_rank * e
    if not b.work.latents:
        # Gradients of what keys and values were cut from, one beside the other and then together.
        expanded = b.tokens(width)
        t.make("d keys and values", expanded)
        t.bump(expanded)
        t.free("d keys", "d values")
        narrow = _narrow(b, mla.kv_rank)
        column_backward(t, narrow, {"d keys and values": expanded}, "d latents normed", features=width, later=later)
    else:
        t.make("d latents normed", latents)
        t.free("d keys", "d values", "latents normed", "turned keys")
    t.bump(2 * latents)
    t.make("d latents", n * (mla.kv_rank + mla.rope_dim) * e)
    t.free("d latents normed", "latents normed")
    t.bump(q)
    if mla.q_rank:
        column_backward(t, _narrow(b, mla.q_rank), {"d queries": q}, "d narrow queries", features=w.q, later=later)
        norm_backward(t, b, "d narrow queries", "d narrow", n * mla.q_rank * e)
        t.free("narrow queries", "narrow queries normed")
        t.bump(b.stream + b.product(mla.q_rank, b.model.hidden))
        t.make(dx, b.stream)
        t.free("d narrow")
    else:
        column_backward(t, b, {"d queries": q}, dx, features=w.q, later=later)
        t.bump(b.stream)
    if not later:
        t.free("d latents", "latents")


def _narrow(b: Bench, width: int) -> Bench:
    """With narrow vectors in place of the stream."""
    return replace(b, model=replace(b.model, hidden=width))


def linear_forward(t: Tape, b: Bench, out: str) -> None:
    """The rows of `activations._linear_attention`, and the result."""
    linear, heads = b.model.linear, b.w.heads
    keys, values = b.tokens(heads * linear.key_dim), b.tokens(heads * linear.value_dim)
    t.make("narrow decays", b.tokens(linear.gate_rank) / b.work.tp)
    t.make("raw decays", keys)
    column_forward(t, b, {"queries": keys, "keys": keys, "values": values, "gates": values})
    t.make("decays", 3 * b.wide(keys))
    if not b.half:
        t.free("raw decays")
    beside, state = _linear_chunks(b)
    t.make("attention output", values)
    t.bump(beside + state)
    t.make("attention output normed", values)
    t.bump(values)
    t.make("attention output gated", values)
    row_forward(t, b, out)
    t.free("raw decays")


def _linear_chunks(b: Bench) -> tuple[float, float]:
    """Bytes of what the chunks of a sequence are worked out with: inputs once more, scaled and decayed; states."""
    linear, heads, work = b.model.linear, b.w.heads, b.work
    keys, values = (b.wide(b.tokens(heads * each)) for each in (linear.key_dim, linear.value_dim))
    chunks = -(-(work.tokens // work.sequences) // linear.chunk) * work.sequences
    state = chunks * heads * linear.key_dim * linear.value_dim * work.precise
    scores = work.tokens * heads * linear.chunk * work.precise
    return 8 * keys + 3 * values + 2 * scores, 2 * state


def linear_backward(t: Tape, b: Bench, dx: str, *, later: bool = False) -> None:
    """From the stream's gradient to that of the norm's output."""
    linear, heads = b.model.linear, b.w.heads
    keys, values = b.tokens(heads * linear.key_dim), b.tokens(heads * linear.value_dim)
    row_backward(t, b, "d gated", values, features=heads * linear.value_dim, later=later)
    if not later:
        t.free("attention output gated")
    t.bump(2 * values)
    t.make("d gates", values)
    t.make("d normed", values)
    t.free("d gated")
    norm_backward(t, b, "d normed", "d attention output", values)
    t.free("attention output normed")
    beside, state = _linear_chunks(b)
    t.make("d keys", keys)
    t.make("d queries", keys)
    t.make("d values", values)
    t.make("d decays", b.wide(keys))
    t.bump(1.5 * beside + 2 * state)
    t.free("d attention output", "attention output")
    grads = {"d queries": keys, "d keys": keys, "d values": values, "d gates": values}
    column_backward(t, b, grads, dx, features=heads * max(linear.key_dim, linear.value_dim), later=later)
    t.bump(b.stream + b.wide(keys))
    t.free("d decays")
    if not later:
        t.free("queries", "keys", "values", "gates", "decays", "narrow decays")
