"""Projections and norms, forward and backward (`parallel.projection`, `parallel.tensor`, `models.functional`)."""

from __future__ import annotations

from collections.abc import Mapping

from .tape import Tape
from .ways import Bench


def column_forward(t: Tape, b: Bench, outs: Mapping[str, float]) -> None:
    """Reads the stream; makes `outs`, in bytes by name. Over tp the tokens are gathered for that."""
    gathered = b.whole if b.work.tp > 1 else 0.0
    for name, nbytes in outs.items():
        t.make(name, nbytes)
    t.bump(gathered)


def column_backward(
    t: Tape,
    b: Bench,
    grads: Mapping[str, float],
    dx: str,
    *,
    features: float,
    later: bool = False,
) -> None:
    """From the gradients `grads` to that of the stream, `dx`; `features` of the widest weight."""
    cut = b.work.tp > 1
    gathered = b.whole if cut and not later else 0.0
    t.bump(gathered + b.whole)
    product = 0.0 if later else b.product(features, b.model.hidden)
    if cut:
        t.bump(gathered + b.whole + b.stream + b.collected(b.whole) + product)
    else:
        t.bump(b.whole + product)
    t.make(dx, b.stream)
    if not later:
        t.free(*grads)


def row_forward(t: Tape, b: Bench, out: str) -> None:
    """Makes `out` of the stream's shape; over tp it is a sum over the ranks, scattered."""
    if b.work.tp > 1:
        t.bump(b.whole + b.stream + b.collected(b.whole))
    t.make(out, b.stream)


def row_backward(t: Tape, b: Bench, dx: str, nbytes: float, *, features: float, later: bool = False) -> None:
    """From the stream's gradient, which stays, to that of the input, `dx`."""
    gathered = b.whole if b.work.tp > 1 else 0.0
    product = 0.0 if later else b.product(features, b.model.hidden)
    t.bump(gathered + nbytes + product)
    t.make(dx, nbytes)
    if later and gathered:
        t.make(f"gathered for {dx}", gathered)


def norm_forward(t: Tape, b: Bench, out: str, nbytes: float) -> None:
    """Makes the normed tensor."""
    t.make(out, nbytes)
    t.bump(b.chunk(nbytes, 2))
    t.copy_rows()


def norm_backward(t: Tape, b: Bench, dy: str, dx: str, nbytes: float) -> None:
    """From `dy` to `dx`; the input over its root mean square and that times `dy` are made beside."""
    if b.half:
        t.bump(nbytes + b.chunk(nbytes, 3))
    else:
        t.bump((3 if b.model.norm == "rms" else 1) * nbytes)
    t.make(dx, nbytes)
    t.free(dy)
