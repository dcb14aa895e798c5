"""The gradient sums of one bucket on a rank: whole until the update, or spread as soon as a microbatch is through.

    WholeSums     every microbatch is added into memory of the bucket's size; one reduction a step
    SpreadSums    what the rank keeps is its part of the sum over all ranks. Memory of the bucket's size is there from a
                  microbatch's first gradient until they are all there: then it is scattered over the ranks, and what
                  arrives is added to the part

Sums are linear, so it does not matter which microbatches the memory has gradients of when it is scattered, as long as
all ranks scatter at the same point of the program: where the last of the bucket's parameters has had all its uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..comm.axis import Axis
from ..comm.collectives import Handle, all_reduce, reduce_scatter
from ..gradients import ExactSlot, Slot
from ..kernels.exact_sums import from_words
from .spread import SpreadAxes


@dataclass(frozen=True)
class SumPlace:
    """Where the sums of a bucket's gradients are added.

    Args:
        spans: first and last element of each parameter, and its shape.
        size: elements of the bucket.
        axes: over which gradients are summed and spread.
        partial: the axis over which they are partial sums besides (size 1: none).
        dtype: of the sums.
        device: where they are.
        exact: they have the same bits in whatever order, and on however many ranks, gradients are added.
    """

    spans: Sequence[tuple[int, int, torch.Size]]
    size: int
    axes: SpreadAxes
    partial: Axis
    dtype: torch.dtype
    device: torch.device
    exact: bool = False

    def zeros(self, size: int) -> Tensor:
        """New memory."""
        return torch.zeros(size, dtype=self.dtype, device=self.device)


class SumHooks(Protocol):
    """Who is told what happens to the sums of a bucket."""

    def before_sums(self) -> None:
        """A reduction is about to start."""
        ...

    def final(self, number: int) -> None:
        """A parameter's gradient will not change any more before it is handed over."""
        ...

    def handed_over(self) -> None:
        """The gradients belong to a collective from now on."""
        ...


class GradientSums(Protocol):
    """The sums of one bucket."""

    slots: list[Slot]
    """One per parameter."""
    held: Tensor
    """What there is all the time, flat."""

    def start_step(self, microbatches: int) -> None:
        """Before the first forward of a step."""
        ...

    def settle(self) -> None:
        """Returns when nothing is under way."""
        ...

    def reduce(self) -> None:
        """No gradient will come any more: returns when `owned` is the sum over all ranks."""
        ...

    def clear(self) -> None:
        """Forgets what is under way, after a step that was left half-way."""
        ...

    @property
    def owned(self) -> Tensor:
        """The reduced gradient of this rank's share of the states, flat (n,)."""
        ...


class WholeSums:
    """Sums of all microbatches, which are reduced once a step: as soon as every gradient is final.

    Args:
        place: of the bucket.
        hooks: told of it.
    """

    def __init__(self, place: SumPlace, hooks: SumHooks) -> None:
        self._place, self._hooks = place, hooks
        self.held = place.zeros(place.size)
        share = place.size // place.axes.states.size
        start = place.axes.share * share
        self._owned = self.held[start : start + share]
        self._start = start
        self._words = torch.zeros(place.size, 2, dtype=torch.float64, device=place.device) if place.exact else None
        """The exact sums; `held` then has single gradients, and what is owned of the sum at the end."""
        self.slots = [self._slot(number, *span) for number, span in enumerate(place.spans)]
        self._missing = 0
        self._reducing: Handle | None = None

    @property
    def owned(self) -> Tensor:
        return self._owned

    def start_step(self, microbatches: int) -> None:
        self._missing, self._reducing = len(self.slots), None
        for slot in self.slots:
            slot.start_step(microbatches)

    def _slot(self, number: int, low: int, high: int, shape: torch.Size) -> Slot:
        buffer, final = self.held[low:high].view(shape), partial(self._one_final, number)
        return Slot(buffer, final) if self._words is None else ExactSlot(buffer, final, self._words[low:high])

    def _one_final(self, number: int) -> None:
        self._hooks.final(number)
        self._missing -= 1
        if self._missing == 0:
            self._launch()

    @property
    def _sums(self) -> Tensor:
        """What is added up over the ranks, flat."""
        return self.held if self._words is None else self._words.view(-1)

    def _launch(self) -> None:
        for slot in self.slots if self._words is None else ():
            if slot.fresh:  # no token reached the parameter in this step
                slot.buffer.zero_()
        self._hooks.before_sums()
        self._hooks.handed_over()
        if self._place.partial.size == 1:
            self._reducing = self._reduce_over_data()
            return
        partial_sum = all_reduce(self._sums, self._place.partial)

        def finish() -> Tensor:
            partial_sum.wait()
            return self._reduce_over_data().wait()

        self._reducing = Handle(self._sums, finish)

    def _reduce_over_data(self) -> Handle:
        states, copies = self._place.axes.states, self._place.axes.copies
        if states.size == 1:
            return all_reduce(self._sums, copies)
        each = len(self._sums) // len(self.held)
        owned = self._sums[each * self._start : each * (self._start + len(self._owned))]
        scattered = reduce_scatter(self._sums, states, out=owned)
        if copies.size == 1:
            return scattered
        return Handle(owned, lambda: all_reduce(scattered.wait(), copies).wait())

    def settle(self) -> None:
        if self._reducing is not None:
            self._reducing.wait()

    def reduce(self) -> None:
        if self._reducing is None:
            self._launch()
        self.settle()
        if self._words is not None:
            self._owned.copy_(from_words(self._words[self._start : self._start + len(self._owned)]))

    def clear(self) -> None:
        self._reducing = None


class SpreadSums:
    """A part of the sums, to which each microbatch's are scattered.

    Where states are spread further than gradients, the part is several shares, of which the last sum of a step leaves
    this rank's:

        states 4, gradients 2    shares 0 1│2 3    rank 0 keeps 0 and 2 between microbatches, and updates 0

    Shares have the order of `SpreadAxes.share`; where the scatter wants another one, a copy is sent.

    Args:
        place: of the bucket.
        hooks: told of it.
    """

    def __init__(self, place: SumPlace, hooks: SumHooks) -> None:
        self._place, self._hooks = place, hooks
        self._rows = place.axes.between.size
        self.held = place.zeros(place.size // place.axes.grads.size)
        share = self.held.numel() // self._rows
        start = place.axes.between.rank * share
        self._owned = self.held[start : start + share]
        numbers = range(len(place.spans))
        self.slots = [Slot(None, partial(self._one_through, number), self._open) for number in numbers]
        self._left = [0] * len(self.slots)
        """Uses of each parameter in this step whose gradients have not been scattered yet."""
        self._missing = 0
        self._full: Tensor | None = None
        self._scattering: Callable[[], None] | None = None
        self._first = self._reduced = True

    @property
    def owned(self) -> Tensor:
        return self._owned

    def start_step(self, microbatches: int) -> None:
        self._first, self._reduced = True, False
        for number, slot in enumerate(self.slots):
            self._left[number] = slot.uses * microbatches
        self._await()

    def _await(self) -> None:
        """Of each parameter the uses of a microbatch, as long as there are any left."""
        self._missing = 0
        for slot, left in zip(self.slots, self._left, strict=True):
            slot.start_step(1)
            slot.remaining = min(slot.uses, left)
            self._missing += left > 0

    def _open(self) -> None:
        """Makes the memory that the next gradients are added into."""
        self._full = full = torch.empty(self._place.size, dtype=self._place.dtype, device=self._place.device)
        full[self._place.spans[-1][1] :].zero_()
        for slot, (low, high, shape) in zip(self.slots, self._place.spans, strict=True):
            slot.give(full[low:high].view(shape))

    def _one_through(self, number: int) -> None:
        self._hooks.final(number)
        self._missing -= 1
        if self._missing == 0:
            self._scatter()

    def _scatter(self) -> None:
        for number, slot in enumerate(self.slots):
            # A parameter may have had more uses than one microbatch's, while another one waited for its first.
            self._left[number] -= min(slot.uses, self._left[number]) - slot.remaining
        if self._full is None:  # all of them made in the forward pass, and gone with an earlier microbatch's
            self._open()
        full, self._full = self._full, None
        assert full is not None
        for slot, (low, high, _) in zip(self.slots, self._place.spans, strict=True):
            if slot.fresh:  # no token reached the parameter
                full[low:high].zero_()
            slot.give(None)
        self._hooks.before_sums()
        self.settle()
        self._hooks.handed_over()
        self._send(full)
        self._await()

    def _send(self, full: Tensor) -> None:
        grads = self._place.axes.grads
        wide = self._place.axes.params.size
        rows = full.view(wide, self._rows, grads.size // wide, -1)
        full = rows.permute(2, 0, 1, 3).reshape(-1)  # no copy where there is only one of rows, or of the other two
        first, self._first = self._first, False
        arriving = reduce_scatter(full, grads, out=self.held if first else None)

        def finish(sent: Tensor) -> None:
            found = arriving.wait()
            if not first:
                self.held.add_(found)
            del sent  # which the collective has read until now

        self._scattering = partial(finish, full)

    def settle(self) -> None:
        if self._scattering is not None:
            self._scattering()
            self._scattering = None

    def reduce(self) -> None:
        if self._reduced:
            return
        if any(self._left) or self._first:
            self._scatter()
        self.settle()
        axes, self._reduced = self._place.axes, True
        if self._rows > 1:
            reduce_scatter(self.held, axes.between, out=self.owned).wait()
        for axis in (axes.copies, self._place.partial):
            all_reduce(self.owned, axis).wait()

    def clear(self) -> None:
        self._scattering = self._full = None
        for slot in self.slots:
            slot.give(None)
