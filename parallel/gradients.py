"""Where a parameter's gradient goes.

A parameter may carry a `Slot` (see `give_slot`). Backward code then adds its weight gradient straight into the slot's
buffer, in the buffer's precision, and tells autograd nothing; without a slot (FSDP2, tests) the gradient is returned
to autograd. Adding and telling are two calls, because a gradient may be computed earlier than it becomes final (the
head's, which is made in forward) or later (deferred weight gradients). Each use of a parameter tells once in every
microbatch, so a gradient is final after a known number of calls, in whatever order a program makes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from .comm.collectives import Handle
from .kernels.exact_sums import add_words
from .kernels.grouped_gemm import Gemms
from .kernels.precision import precise
from .kernels.weight_products import add, add_product

T = TypeVar("T")


class Slot:
    """One parameter's gradient sum, a view into a flat bucket.

    Args:
        buffer: the sum, of the parameter's shape, in the precision of gradient sums; none: there is no memory for it
            until `make` gives some.
        on_final: called when the last gradient has been added that is expected.
        make: called when there is no memory and a gradient comes.
    """

    __slots__ = ("_buffer", "_make", "fresh", "on_final", "remaining", "store", "uses")

    def __init__(
        self, buffer: Tensor | None, on_final: Callable[[], None], make: Callable[[], None] = lambda: None
    ) -> None:
        self._buffer, self._make, self.on_final = buffer, make, on_final
        self.fresh = True
        self.uses = 1
        self.remaining = 0
        self.store: WeightGradients | None = None
        """Where weight gradients wait while their stage's backward is split."""

    @property
    def buffer(self) -> Tensor:
        """The sum."""
        if self._buffer is None:
            self._make()
        assert self._buffer is not None
        return self._buffer

    def give(self, buffer: Tensor | None) -> None:
        """Other memory, which has no gradients yet; none: none, until the next one comes."""
        self._buffer, self.fresh = buffer, True

    def start_step(self, microbatches: int) -> None:
        """Forgets the last step's sum, which the next gradient overwrites; expects `uses` gradients a microbatch."""
        self.fresh, self.remaining = True, self.uses * microbatches

    def add(self, grad: Tensor) -> None:
        """sum += grad, of the parameter's shape (out, in) or (…,)."""
        add(self.buffer, grad, self.fresh)
        self.wrote()

    def add_matmul(self, dy: Tensor, x: Tensor) -> None:
        """sum += dyᵀ x, for dy (N, out) and x (N, in)."""
        add_product(self.buffer, dy, x, self.fresh)
        self.wrote()

    def add_grouped(self, dy: Tensor, x: Tensor, gemms: Gemms) -> None:
        """sum[e] += dyᵀ x over the rows of each expert e, for dy (R, out), x (R, in) and the sum (E, out, in)."""
        gemms.add_weight(dy, x, self.buffer, self.fresh)
        self.wrote()

    def add_rows(self, rows: Tensor, grad: Tensor) -> None:
        """sum[rows] += grad: an embedding's gradient, for rows (N,) and grad (N, hidden)."""
        if self.fresh:
            self.buffer.zero_()
        self.buffer.index_add_(0, rows, grad.to(self.buffer.dtype))
        self.wrote()

    def wrote(self) -> None:
        """The buffer holds a gradient more."""
        self.fresh = False

    def done(self) -> None:
        """One of the parameter's uses has added its gradient of one microbatch."""
        self.remaining -= 1
        if self.remaining == 0:
            self.on_final()


class ExactSlot(Slot):
    """A slot whose sum has the same bits in whatever order gradients come; the buffer holds one of them at a time.

    Args:
        buffer, on_final: as of `Slot`.
        words: (elements, 2) fp64, the sum (`kernels.exact_sums`).
    """

    __slots__ = ("words",)

    def __init__(self, buffer: Tensor, on_final: Callable[[], None], words: Tensor) -> None:
        super().__init__(buffer, on_final)
        self.words = words

    def start_step(self, microbatches: int) -> None:
        super().start_step(microbatches)
        self.words.zero_()

    @torch.no_grad()
    def wrote(self) -> None:
        add_words(self.words, self.buffer)


class Deferred(Protocol):
    """Weight gradients that are still to be computed."""

    def start(self) -> Handle:
        """Starts whatever communication they need."""
        ...

    def finish(self, whole: Tensor) -> object:
        """Computes them; `whole` (N, in) is what `start` gave."""
        ...


@dataclass(frozen=True)
class DeferredMatmul:
    """The `Deferred` of y = x weightᵀ whose x (N, in) is at hand, with dy (N, out); multiplied in dy's precision."""

    weight: Tensor
    dy: Tensor
    x: Tensor

    def start(self) -> Handle:
        return Handle(self.x)

    def finish(self, whole: Tensor) -> Tensor | None:
        return matmul_grad(self.weight, self.dy, whole.to(self.dy.dtype))


class WeightGradients:
    """The weight gradients that one stage has not computed yet, per microbatch."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Deferred]] = {}
        self._open: deque[Deferred] | None = None

    def clear(self) -> None:
        """Drops everything, after a step that was left half-way."""
        self._waiting.clear()
        self._open = None

    @contextmanager
    def deferring(self, index: int) -> Iterator[None]:
        """A backward inside this block leaves its weight gradients here, under the microbatch's number."""
        self._open = self._waiting[index] = deque()
        try:
            yield
        finally:
            self._open = None

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """A backward inside this block, itself inside `deferring`, leaves nothing here."""
        held, self._open = self._open, None
        try:
            yield
        finally:
            self._open = held

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def put(self, deferred: Deferred) -> None:
        """Leaves weight gradients for later."""
        assert self._open is not None
        self._open.append(deferred)

    @torch.no_grad()
    def compute(self, index: int) -> None:
        """Computes what was left under the microbatch's number; each one's communication runs behind the last one."""
        jobs = self._waiting.pop(index)
        handle = jobs[0].start() if jobs else None
        while handle is not None:
            job, whole = jobs.popleft(), handle.wait()
            handle = jobs[0].start() if jobs else None
            job.finish(whole)


def open_store(params: Sequence[Tensor | None]) -> WeightGradients | None:
    """The store into which the weight gradients of `params` go now, if their backward is split."""
    slot = slot_of(params[0])
    if slot is None or slot.store is None or not slot.store.is_open:
        return None
    return slot.store


@contextmanager
def at_once(params: Iterable[Tensor]) -> Iterator[None]:
    """A backward inside this block computes the weight gradients of `params` even where their stage's is split."""
    store = open_store(list(params))
    with store.pausing() if store is not None else nullcontext():
        yield


_SLOT = "slot"
"""The attribute of a parameter that has one; nothing else reads or writes it."""


def give_slot(param: Tensor, slot: Slot) -> None:
    """From now on the parameter's gradients are added to the slot."""
    setattr(param, _SLOT, slot)


def slot_of(param: Tensor | None) -> Slot | None:
    """The slot that a parameter of any shape carries, if it does."""
    slot = getattr(param, _SLOT, None)
    assert slot is None or isinstance(slot, Slot)
    return slot


def matmul_grad(param: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """Weight gradient (out, in) of y = x paramᵀ, for dy (N, out) and x (N, in).

    Added to the slot (returns None), or returned for autograd.
    """
    slot = slot_of(param)
    if slot is None:
        return dy.t() @ x
    slot.add_matmul(dy, x)
    slot.done()
    return None


def grouped_grad(param: Tensor, dy: Tensor, x: Tensor, gemms: Gemms) -> Tensor | None:
    """Weight gradient (E, out, in) of a grouped projection of the rows x (R, in), with dy (R, out)."""
    slot = slot_of(param)
    if slot is None:
        grad = torch.empty_like(param)
        gemms.add_weight(dy, x, grad, True)
        return grad
    slot.add_grouped(dy, x, gemms)
    slot.done()
    return None


def plain_grad(param: Tensor, grad: Tensor) -> Tensor | None:
    """Any other gradient, of the shape (…,) of its parameter: added to the slot (returns None), or returned."""
    slot = slot_of(param)
    if slot is None:
        return grad.to(param.dtype)
    slot.add(grad)
    slot.done()
    return None


def add_in_place(param: Tensor, write: Callable[[Tensor, bool], T]) -> tuple[T, Tensor | None]:
    """Any gradient that `write(total, fresh)` puts into total (fresh) or adds to it itself, as a part of what it does.

    Returns:
        What `write` returns, and what autograd is to be given for the parameter.
    """
    slot = slot_of(param)
    if slot is None:
        total = torch.empty_like(param, dtype=precise(param.dtype))
        return write(total, True), total.to(param.dtype)
    made = write(slot.buffer, slot.fresh)
    slot.wrote()
    slot.done()
    return made, None


def route(param: nn.Parameter) -> None:
    """Moves what autograd itself accumulates for `param` into its slot."""

    def moved(p: Tensor) -> None:
        slot = slot_of(p)
        if slot is not None and p.grad is not None:
            slot.add(p.grad)
            p.grad = None
            slot.done()

    param.register_post_accumulate_grad_hook(moved)
