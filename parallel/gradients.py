"""Where a parameter's gradient goes.

A parameter may carry a `Slot` (attribute `slot`). Backward code then adds its weight gradient straight into the slot's
buffer, in the buffer's precision, and tells autograd nothing; without a slot (FSDP2, tests) the gradient is returned
to autograd. Adding and telling are two calls, because a gradient may be computed earlier than it becomes final (the
head's, which is made in forward) or later (deferred weight gradients).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Slot:
    """One parameter's gradient sum, a view into a flat bucket.

    Args:
        buffer: the sum, of the parameter's shape, in the precision of gradient sums.
        on_final: called when the last gradient of the step has been added.
    """

    __slots__ = ("buffer", "fresh", "on_final", "remaining", "uses")

    def __init__(self, buffer: Tensor, on_final: Callable[[], None]) -> None:
        self.buffer, self.on_final = buffer, on_final
        self.fresh = True
        self.uses = 1
        self.remaining = -1

    def start_step(self) -> None:
        """Forgets the last step's sum: the next gradient overwrites it."""
        self.fresh, self.remaining = True, -1

    def arm(self) -> None:
        """The backward that comes now is the step's last: `uses` more calls of `done` make the gradient final."""
        self.remaining = self.uses

    def add(self, grad: Tensor) -> None:
        """sum += grad."""
        if self.fresh:
            self.buffer.copy_(grad)
            self.fresh = False
        else:
            self.buffer.add_(grad)

    def add_matmul(self, dy: Tensor, x: Tensor) -> None:
        """sum += dyᵀ x, for dy (N, out) and x (N, in), without a temporary where the precisions agree."""
        if dy.dtype != self.buffer.dtype:
            self.add(dy.t() @ x)
        elif self.fresh:
            torch.mm(dy.t(), x, out=self.buffer)
            self.fresh = False
        else:
            self.buffer.addmm_(dy.t(), x)

    def add_rows(self, rows: Tensor, grad: Tensor) -> None:
        """sum[rows] += grad: an embedding's gradient."""
        if self.fresh:
            self.buffer.zero_()
            self.fresh = False
        self.buffer.index_add_(0, rows, grad.to(self.buffer.dtype))

    def done(self) -> None:
        """One of the parameter's uses has added its gradient of this backward."""
        if self.remaining > 0:
            self.remaining -= 1
            if self.remaining == 0:
                self.on_final()


def slot_of(param: Tensor | None) -> Slot | None:
    """The slot that a parameter carries, if it does."""
    return getattr(param, "slot", None)


def matmul_grad(param: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """Weight gradient of y = x paramᵀ: added to the slot (returns None), or returned for autograd."""
    slot = slot_of(param)
    if slot is None:
        return dy.t() @ x
    slot.add_matmul(dy, x)
    slot.done()
    return None


def plain_grad(param: Tensor, grad: Tensor) -> Tensor | None:
    """Any other gradient: added to the slot (returns None), or returned for autograd."""
    slot = slot_of(param)
    if slot is None:
        return grad.to(param.dtype)
    slot.add(grad)
    slot.done()
    return None


def route(param: nn.Parameter) -> None:
    """Moves what autograd itself accumulates for `param` into its slot."""

    def moved(p: Tensor) -> None:
        slot = slot_of(p)
        if slot is not None and p.grad is not None:
            slot.add(p.grad)
            p.grad = None
            slot.done()

    param.register_post_accumulate_grad_hook(moved)
