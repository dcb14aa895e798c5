"""A whole layer: what is kept of it, and the most that is alive while its passes go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from ..activations import layer_rows
from ..kept import INPUT, Choice, Kept, kept_bytes, kept_rows, share_again
from . import attention
from .experts import experts_backward, experts_forward
from .feed_forward import ffn_backward, ffn_forward
from .projections import norm_backward, norm_forward
from .tape import Tape, rows_of
from .ways import Bench

GRAD = "d stream"


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Of one layer and one microbatch, on one rank.

    Args:
        kept: from the forward to the backward pass, its input included.
        forward: the most that is alive in the forward pass, its input included.
        backward: the most that is alive in the backward pass until the gradient of its last matrix is final, then in
            its feed-forward half, and in its attention; with what is kept and the gradients of its output and input.
        deferred: what weight gradients that are left for later hold.
    """

    kept: float
    forward: float
    backward: tuple[float, float, float]
    deferred: float


@lru_cache(maxsize=4096)
def layer_bytes(b: Bench, layer: int, choice: Choice = "none", *, split: bool = False) -> LayerBytes:
    """What a layer of a resolved model holds.

    Args:
        b: model, microbatch and device.
        layer: its index.
        choice: what is made again in backward; hashable.
        split: its weight gradients are left for later.
    """
    rows = layer_rows(b.model, layer, b.work)
    kept = {row.name: float(row.nbytes) for row in kept_rows(rows, choice)}
    some = {row.name: kept.pop(row.name) for row in rows if 0 < share_again(row, choice) < 1}
    middle = [row.name for row in rows].index("middle")
    forward = Tape({INPUT: b.stream}, some)
    attention_half(forward, b, layer)
    # What is made again goes with the half of the layer that works on it.
    forward.keep_only((*kept, *map(rows_of, some), "middle", "attention result"))
    ffn_half(forward, b, layer)
    backward = Tape(kept | {rows_of(name): nbytes for name, nbytes in some.items()} | {GRAD: b.stream})
    if choice == "full":
        backward.peak = max(backward.peak, _again(b, layer))
    _make(backward, rows if choice == "full" else rows[middle:])
    ffn_half_backward(backward, b, layer, split=split)
    backward.mark()
    peaks = [backward.before or 0.0, backward.peak]
    backward.peak = backward.now
    _make(backward, [] if choice == "full" else rows[:middle])
    attention_half_backward(backward, b, layer, split=split)
    deferred = sum(nbytes for name, nbytes in backward.live.items() if name != "d input") if split else 0.0
    return LayerBytes(
        kept=kept_bytes(rows, choice),
        forward=forward.peak,
        backward=(peaks[0], peaks[1], backward.peak),
        deferred=deferred,
    )


def attention_half(t: Tape, b: Bench, layer: int) -> None:
    """Up to the residual stream in the middle."""
    norm_forward(t, b, "attention norm", b.stream)
    match _kind(b, layer):
        case "linear":
            attention.linear_forward(t, b, "attention result")
        case "latent":
            attention.latent_forward(t, b, "attention result")
        case _:
            attention.softmax_forward(t, b, "attention result")
    t.copy_rows()
    _dropout(t, b, "attention result", "attention dropout")
    t.make("middle", b.stream)


def ffn_half(t: Tape, b: Bench, layer: int, *, output: bool = True) -> None:
    """From the residual stream in the middle to the layer's output, or to what is added for it."""
    norm_forward(t, b, "ffn norm", b.stream)
    t.free("attention result")
    if layer in b.model.routed_layers:
        experts_forward(t, b, "ffn result")
    else:
        ffn_forward(t, b, "ffn", b.w.ffn, "ffn result")
    _dropout(t, b, "ffn result", "ffn dropout")
    if output:
        t.make("output", b.stream)
        t.free("ffn result")


def _dropout(t: Tape, b: Bench, result: str, mask: str) -> None:
    """Draws are fp32 numbers, made on the host."""
    if b.model.dropout:
        elements = b.stream / b.work.width
        t.make(mask, elements)
        t.bump(8 * elements)
        t.make(f"{result} dropped", b.stream)
        t.bump(b.stream)
        t.free(result)
        t.live[result] = t.live.pop(f"{result} dropped")


def _again(b: Bench, layer: int) -> float:
    """The most that is alive while a whole layer runs again, up to the last tensor that is needed."""
    t = Tape({INPUT: b.stream, GRAD: b.stream})
    attention_half(t, b, layer)
    ffn_half(t, b, layer, output=False)
    return t.peak


def _make(t: Tape, rows: Sequence[Kept]) -> None:
    """Makes those that are not there; of which some rows are there, those that one part makes together."""
    missing = [row for row in rows if row.name not in t.live]
    for _, together in groupby(missing, key=lambda row: (row.parts, rows_of(row.name) in t.live)):
        made = list(together)
        for row in made:
            if rows_of(row.name) in t.live:
                t.make(_rest_of(row), row.nbytes - t.live[rows_of(row.name)])
        for row in made:
            t.make(row.name, row.nbytes)
            t.free(rows_of(row.name), _rest_of(row))


def _rest_of(row: Kept) -> str:
    """The name of the rows that are made again."""
    return f"rest of {row.name}"


def ffn_half_backward(t: Tape, b: Bench, layer: int, *, split: bool = False) -> None:
    """From the gradient of the layer's output to that of the residual stream in its middle, in one tensor."""
    _dropout_backward(t, b, "ffn dropout")
    if layer in b.model.routed_layers:
        experts_backward(t, b, "d ffn norm", later=split)
    else:
        ffn_backward(t, b, "ffn", b.w.ffn, "d ffn norm", later=split)
    if not split:
        t.free("ffn norm")
    norm_backward(t, b, "d ffn norm", "d middle", b.stream)
    t.free("middle", "ffn norm numbers", "d middle", "d dropped")
    if split and b.work.tp == 1 and (layer not in b.model.routed_layers or b.model.moe.shared):
        # The last matrix waits with the gradient of the output, attention's with that of the middle.
        t.make("d output", b.stream)


def attention_half_backward(t: Tape, b: Bench, layer: int, *, split: bool = False) -> None:
    """From there to the gradient of the layer's input."""
    _dropout_backward(t, b, "attention dropout")
    match _kind(b, layer):
        case "linear":
            attention.linear_backward(t, b, "d attention norm", later=split)
        case "latent":
            attention.latent_backward(t, b, "d attention norm", later=split)
        case _:
            attention.softmax_backward(t, b, "d attention norm", later=split)
    if not split:
        t.free("attention norm")
    norm_backward(t, b, "d attention norm", "d input", b.stream)
    t.free(INPUT, "attention norm numbers", "d dropped")


def _dropout_backward(t: Tape, b: Bench, mask: str) -> None:
    if b.model.dropout:
        t.make("d dropped", b.stream)
        t.bump(b.stream)
        t.free(mask)


def _kind(b: Bench, layer: int) -> str:
    if layer in b.model.linear_layers:
        return "linear"
    return "latent" if b.model.mla.kv_rank else "softmax"
