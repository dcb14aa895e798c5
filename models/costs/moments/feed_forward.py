"""Feed-forward networks, forward and backward (`models.feed_forward`, `models.functional`)."""

from __future__ import annotations

from .projections import column_backward, column_forward, row_backward, row_forward
from .tape import Tape
from .ways import Bench


def ffn_forward(t: Tape, b: Bench, name: str, width: int, out: str) -> None:
    """The rows of `activations._network` and the result."""
    nbytes, gated = b.tokens(width), b.model.activation.startswith("swiglu")
    before = ("gate", "up") if gated else ("up",)
    column_forward(t, b, {f"{name} {matrix}": nbytes for matrix in before})
    t.copy_rows()
    nonlinearity(t, b, f"{name} activation", nbytes)
    t.copy_rows()
    row_forward(t, b, out)


def nonlinearity(t: Tape, b: Bench, out: str, nbytes: float) -> None:
    """The non-linearity's output from what is there."""
    t.make(out, nbytes)
    if b.model.activation == "swiglu_clipped":
        t.bump(b.chunk(nbytes, 4) if b.half else nbytes)


def nonlinearity_backward(t: Tape, b: Bench, name: str, nbytes: float) -> None:
    """From the gradient of its output to those of its inputs, `d {name} …`."""
    grad = f"d {name} activation"
    if not b.model.activation.startswith("swiglu"):
        t.make(f"d {name} up", nbytes)
        t.free(grad, f"{name} up")
        return
    clipped = b.model.activation == "swiglu_clipped"
    if clipped and b.half:
        t.bump(2 * nbytes + b.chunk(nbytes, 6))
    else:
        t.bump((4 + 1 / b.work.width if clipped else 2) * nbytes)
    t.make(f"d {name} gate", nbytes)
    t.make(f"d {name} up", nbytes)
    t.free(grad, f"{name} gate", f"{name} up")


def ffn_backward(t: Tape, b: Bench, name: str, width: int, dx: str, *, later: bool = False) -> None:
    """From the stream's gradient, which stays, to that of the network's input."""
    nbytes = b.tokens(width)
    row_backward(t, b, f"d {name} activation", nbytes, features=width, later=later)
    t.mark()  # from here on the last matrix's gradient is final
    if not later:
        t.free(f"{name} activation")
    nonlinearity_backward(t, b, name, nbytes)
    before = ("gate", "up") if b.model.activation.startswith("swiglu") else ("up",)
    column_backward(t, b, {f"d {name} {m}": nbytes for m in before}, dx, features=width, later=later)
