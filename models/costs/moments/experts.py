"""A mixture's half of a layer, forward and backward (`models.moe`, `parallel.expert`)."""

from __future__ import annotations

from .feed_forward import ffn_backward, ffn_forward
from .tape import Tape
from .ways import Bench


class _Sizes:
    """Bytes of the tensors of one layer's journey."""

    def __init__(self, b: Bench) -> None:
        h, e, m = b.model.hidden, b.work.width, b.model
        arrived, sent = b.work.expert_rows(m), b.work.sent_rows(m)
        self.arrived, self.sent = arrived * h * e, sent * h * e
        self.inner = arrived * b.w.expert * e
        self.scores = b.work.stream * (m.moe.experts + m.moe.router.null_experts) * b.work.precise
        self.everywhere = b.work.ranks * b.work.stream * h * e
        self.gathers = m.moe.dispatcher == "all_gather"
        self.travels = b.work.ranks > 1 and not self.gathers
        # Rows of several sources are brought into the order of the experts, in a tensor of their own.
        self.ordered = self.travels and m.moe.experts * b.work.etp > b.work.ranks
        self.gated = m.activation.startswith("swiglu")


def experts_forward(t: Tape, b: Bench, out: str) -> None:
    """The rows of `activations._moe`, and the result."""
    x, moe = _Sizes(b), b.model.moe
    t.make("router", 3 * x.scores)
    t.make("sent rows", x.sent)
    if x.travels:
        t.make("rows under way", x.arrived)
    if moe.shared:
        ffn_forward(t, b, "shared expert", b.w.shared, "shared result")
        if moe.shared_gate:
            t.make("shared expert before its gate", b.stream)
    if x.gathers:
        t.bump(x.everywhere + x.arrived)
    if x.ordered or x.gathers:
        t.make("expert rows", x.arrived)
        t.free("sent rows")
    else:
        t.live["expert rows"] = t.live.pop("rows under way" if x.travels else "sent rows")
        t.free("sent rows")
    for matrix in ("gate", "up") if x.gated else ("up",):
        t.make(f"expert {matrix}", x.inner)
    t.make("expert activation", x.inner)
    if b.model.activation == "swiglu_clipped":
        t.bump(b.chunk(x.inner, 4) if b.half else x.inner)
    t.make("expert outputs", x.arrived)
    t.free("expert activation")
    _home(t, b, x)
    t.bump(2 * b.wide(b.stream) if b.half else 0.0)
    t.make(out, b.stream)
    if moe.shared:
        t.make("sum of experts", b.stream)
        t.free(out, "shared result")
        t.live[out] = t.live.pop("sum of experts")
    t.free("rows under way", "router")
    if moe.weigh == "before":
        t.free("expert results")


def _home(t: Tape, b: Bench, x: _Sizes) -> None:
    """The results on their way to the tokens' ranks."""
    if x.ordered:
        t.make("expert outputs in order", x.arrived)
        t.free("expert outputs")
        t.live["expert outputs"] = t.live.pop("expert outputs in order")
        t.free("rows under way")
    if x.gathers:
        t.bump(2 * x.everywhere * b.model.moe.top_k)
    if x.travels or x.gathers:
        t.make("expert results", x.sent)
        t.free("expert outputs")
    else:
        t.live["expert results"] = t.live.pop("expert outputs")


def experts_backward(t: Tape, b: Bench, dx: str, *, later: bool = False) -> None:
    """From the stream's gradient, which stays, to that of the experts' input."""
    x, moe = _Sizes(b), b.model.moe
    t.make("d results", x.sent)
    t.bump(b.wide(b.stream) * (2 if b.half else 1) + (b.stream if b.half else 0.0))
    t.free("expert results")
    if x.gathers:
        t.bump(x.everywhere * moe.top_k)
    if x.travels or x.gathers:
        t.make("d rows under way", x.arrived)
        t.free("d results")
    if x.ordered:
        t.make("d outputs", x.arrived)
        t.free("d rows under way")
    grads = _inner_backward(t, b, x, later=later)
    t.make("d rows", x.arrived)
    t.bump(_product(b, x))
    if not later:
        t.free(*grads, "expert rows")
        t.free("d results", "d outputs", "d rows under way")
    if x.ordered:
        t.bump(x.arrived)
    if x.gathers:
        t.bump(2 * x.everywhere * moe.top_k)
    if moe.shared:
        ffn_backward(t, b, "shared expert", b.w.shared, "d shared", later=later)
        t.free("shared expert before its gate")
    if x.travels or x.gathers:
        t.make("d sent rows", x.sent)
        t.free("d rows")
    t.make(dx, b.stream)
    t.free("d rows", "d sent rows", "d shared")
    t.bump(b.stream + 2 * x.scores + b.chunk(b.stream))


def _inner_backward(t: Tape, b: Bench, x: _Sizes, *, later: bool) -> list[str]:
    """Through the second matrix and the non-linearity, whose output is made again; the gradients that are left."""
    t.make("d expert activation", x.inner)
    t.make("expert activation", x.inner)
    clipped = b.model.activation == "swiglu_clipped"
    t.bump((1 + x.gated) * x.inner + (clipped * x.inner if not b.half else clipped * b.chunk(x.inner, 6)))
    grads = []
    for matrix in ("gate", "up") if x.gated else ("up",):
        t.make(f"d expert {matrix}", x.inner)
        grads.append(f"d expert {matrix}")
    t.bump(_product(b, x))
    t.mark()
    t.free("d expert activation", "expert gate", "expert up")
    if not later:
        t.free("expert activation")
    return grads


def _product(b: Bench, x: _Sizes) -> float:
    """Of one expert's weight, with the rows that it is multiplied from."""
    each = max(1, b.model.moe.experts * b.work.etp // max(1, b.work.ranks))
    return b.product(b.w.expert, b.model.hidden) + (max(x.arrived, x.inner) / each if b.half and b.ways.rounds else 0.0)
