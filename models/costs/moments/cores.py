"""Attention's own tensors while it works, beside its operands: of one device's kernel, and of the methods of context
parallelism (docs/context.md)."""

from __future__ import annotations

from dataclasses import dataclass

from .tape import Tape
from .ways import Bench


@dataclass(frozen=True)
class AttentionBytes:
    """Bytes of one rank's share.

    Args:
        q, kv, out: queries, keys with values, results, in the type of the layer.
        lse: log-sum-exps.
    """

    q: float
    k: float
    v: float
    out: float
    lse: float

    @property
    def kv(self) -> float:
        return self.k + self.v

    def times(self, factor: float) -> AttentionBytes:
        return AttentionBytes(self.q * factor, self.k * factor, self.v * factor, self.out * factor, self.lse * factor)


def operand_bytes(b: Bench) -> AttentionBytes:
    """Of the operands that attention saves."""
    w, work, latent = b.w, b.work, b.model.mla.kv_rank > 0
    key, value = (w.q, w.value) if latent else (w.kv, w.kv)
    lse = work.tokens * w.heads * work.precise
    return AttentionBytes(b.tokens(w.q), b.tokens(key), b.tokens(value), b.tokens(w.value), lse)


def score_bytes(b: Bench, heads: float, queries: int, keys: int) -> float:
    """Bytes of the scores that are a tensor at a time."""
    masked = b.model.mla.kv_rank or b.model.window
    if not b.ways.blocks or (b.ways.long and queries >= b.ways.long and not masked):
        return 0.0
    return b.work.sequences * heads * min(b.ways.blocks, queries) * keys * b.work.precise


def kernel_forward(b: Bench, x: AttentionBytes, block: float, *, turned: bool = True) -> float:
    """Beside operands and results of one call: values head by head, and keys that are not (`turned`) or in fp32; a
    block's scores, and those of the block before, which go when they are replaced."""
    if not block:
        return 0.0
    keys = b.wide(x.k) if b.half else 0.0 if turned else x.k
    return keys + x.v + block * 2


def kernel_backward(b: Bench, x: AttentionBytes, block: float, *, turned: bool = True) -> float:
    """Beside operands and results, which are fp32: as forward; probabilities and the gradients of two blocks' scores,
    or a product with them that is to be added."""
    if not block:
        # Kernels give gradients in the type of the operands, which are added to the results.
        return x.q + x.kv
    keys = (b.wide(x.k) if b.half else 0.0) + (0.0 if turned else x.k)
    working = max(4 * block, 2.5 * block + max(x.k, x.v)) if b.half else max(3 * block, 2 * block + max(x.k, x.v))
    sums = b.wide(x.out) * (3 if b.half else 1)
    return 2 * x.lse + max(keys + x.v + working, sums)


def core_forward(t: Tape, b: Bench) -> None:
    """Attention's output and log-sum-exp from "queries", "keys" and "values"; of methods that exchange heads these
    become others."""
    x, work = operand_bytes(b), b.work
    length = work.tokens // work.sequences
    if work.exchanged > 1:
        _exchange(t, b, x)
        length *= work.exchanged
    outer = b.ranks // work.exchanged
    block = score_bytes(b, b.w.heads / work.exchanged, length, length)
    if outer > 1:
        t.bump(_method_forward(b, x, outer) + kernel_forward(b, x, block, turned=_at_home(b, outer)))
        t.make("log-sum-exp", x.lse)
        t.make("attention output", x.out)
    else:
        t.make("attention output", x.out)
        t.make("log-sum-exp", x.lse)
        t.bump(kernel_forward(b, x, block, turned=work.exchanged == 1))
    if work.exchanged > 1:
        t.make("attention output by token", x.out)
        t.bump(x.out / 8)
    elif work.by_head:
        t.make("attention output by token", x.out)


def _exchange(t: Tape, b: Bench, x: AttentionBytes) -> None:
    """Own heads of more tokens, in pieces of up to a sixteenth; the callers still hold the operands."""
    for name, nbytes in (("queries", x.q), ("keys", x.k), ("values", x.v)):
        t.live[f"own {name}"] = t.live.pop(name)
        t.make(name, nbytes)
        t.bump(nbytes / 8)


def core_backward(t: Tape, b: Bench) -> None:
    """From "d attention output" to "d queries", "d keys", "d values", in the layer's type."""
    x, work = operand_bytes(b), b.work
    length = work.tokens // work.sequences
    t.free("attention output by token")
    if work.exchanged > 1:
        length *= work.exchanged
        t.make("d attention output of own heads", x.out)
        t.free("d attention output")
    outer = b.ranks // work.exchanged
    block = score_bytes(b, b.w.heads / work.exchanged, length, length)
    turned = (outer == 1 or _at_home(b, outer)) and work.exchanged == 1
    if outer > 1 or block:  # else one kernel makes them as they are wanted
        beside = kernel_backward(b, x, block, turned=turned)
        if outer > 1:
            t.bump(_method_backward(b, x, outer) + beside)
        for name, nbytes in (("d queries", x.q), ("d keys", x.k), ("d values", x.v)):
            t.make(name, b.wide(nbytes))
        if outer == 1:
            t.bump(beside)
        if b.half:
            t.bump(x.q + x.kv)
    for name, nbytes in (("d queries", x.q), ("d keys", x.k), ("d values", x.v)):
        t.make(name, nbytes)
    t.free("queries", "keys", "values", "keys and values", "attention output", "log-sum-exp")
    t.free("d attention output", "d attention output of own heads")
    if work.exchanged > 1:
        t.bump(max(x.q, x.k, x.v))


def _at_home(b: Bench, ranks: int) -> bool:
    """Whether the keys at work are the rank's own when most is alive: these lie head by head, those sent do not."""
    return b.method == "tokenring" or (ranks == 2 and b.method in ("ring", "usp"))


def _method_forward(b: Bench, x: AttentionBytes, ranks: int) -> float:
    """Made at a time, results included."""
    results = x.out + b.wide(x.out) + 2 * x.lse
    match b.method:
        case "allgather" if b.work.latents:
            return ranks * _latents(b) + _expanded(b) + results
        case "allgather":
            return ranks * x.kv + results
        case "tokenring":
            # Less than it holds at its own peak, which is when results are joined and no kernel works.
            return (4.2 if ranks == 2 else 7.2) * (x.q + x.lse)
        case _:
            # With two ranks nothing arrives any more while the other one's keys are worked on; half of them travel on.
            return (1.5 if ranks == 2 else 2) * x.kv + results


def _method_backward(b: Bench, x: AttentionBytes, ranks: int) -> float:
    """As forward; gradients are in fp32 at least."""
    q, kv = b.wide(x.q), b.wide(x.kv)
    match b.method:
        case "allgather" if b.work.latents:
            return 2 * ranks * _latents(b) + 2 * _expanded(b) + 2 * q + kv
        case "allgather":
            return 2 * ranks * x.kv + kv + 2 * q
        case "tokenring":
            return 5 * q + 1.4 * kv if ranks == 2 else 9 * q + 2 * kv
        case _:
            return 1.5 * x.kv + 2 * kv + 2 * q if ranks == 2 else 2 * x.kv + 4 * kv + 2 * q


def _latents(b: Bench) -> float:
    """Of one rank's tokens, latents and turned keys."""
    mla = b.model.mla
    return b.work.stream * mla.kv_rank * b.work.width + b.tokens(mla.rope_dim)


def _expanded(b: Bench) -> float:
    """Keys, and what keys and values are cut from, of one rank's tokens."""
    mla = b.model.mla
    return b.tokens(b.w.q) + b.tokens(b.w.heads * (mla.nope_dim + mla.value_dim))
