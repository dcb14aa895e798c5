"""Flat buckets: many parameters, one contiguous piece of memory, one collective.

Parameters whose gradients are treated alike (same family, same partial axis, same weight decay) share buckets, in the
order in which backward finishes them. A bucket holds the parameters, the sum of their gradients and, where states are
spread, which equal share of both each rank of their axis owns (`replicas.spread`):

    params   │ p0        │ p1    │ p2 …            │ pad │      one view per parameter
    grads    │ g0        │ g1    │ g2 …            │ pad │      one slot per parameter
    owner    │ rank 0       │ rank 1       │ rank 2      │      of the axis of states

What fills it up makes every share of any spread whole and aligned, so that a bucket is the same at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..checksum import ParameterMemory
from ..comm.collectives import Handle, all_gather, all_reduce, reduce_scatter
from ..comm.mesh import Axis
from ..gradients import ExactSlot, Slot, give_slot, route
from ..kernels.exact_sums import from_words
from ..sharding_rules import Partial, ReplicaFamily, Sharding
from .protocol import BucketEvents, SharedBucket, SharedCopies, SharedMember, adopt
from .spread import SpreadAxes

_ALIGN = 16
"""Elements; every rank's share is a multiple, so that vectorised kernels start aligned."""


@dataclass(frozen=True)
class BucketKind:
    """What the parameters of a bucket have in common."""

    family: ReplicaFamily
    partial: Partial
    decay: bool


@dataclass(frozen=True)
class Member:
    """A parameter's place in its bucket, in elements."""

    name: str
    param: nn.Parameter
    sharding: Sharding
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.param.numel()


class Bucket:
    """One flat bucket on this rank.

    Args:
        kind: what its parameters share.
        params: (global name, parameter, sharding), in the order in which their gradients become final.
        axes: over which gradients are summed and states are spread.
        partial: the axis over which the gradients are partial sums besides (size 1: none).
        grad_dtype: precision of gradient sums.
        exact: sums have the same bits in whatever order, and on however many ranks, gradients are added.
        flat: memory that holds the parameters already (`flat` of another such bucket); called with its size.
    """

    def __init__(
        self,
        kind: BucketKind,
        params: Sequence[tuple[str, nn.Parameter, Sharding]],
        *,
        axes: SpreadAxes,
        partial: Axis,
        grad_dtype: torch.dtype,
        exact: bool = False,
        flat: Callable[[int, nn.Parameter], Tensor] | None = None,
    ) -> None:
        self.kind, self.axes, self.data, self.partial_axis = kind, axes, axes.data, partial
        members, start = [], 0
        for name, param, sharding in params:
            members.append(Member(name, param, sharding, start))
            start = members[-1].stop
        self.members = tuple(members)
        unit = axes.data.size * _ALIGN
        size = math.ceil(start / unit) * unit
        first = params[0][1]
        self._adopts = flat is not None
        self.flat = flat(size, first) if flat else torch.zeros(size, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(size, dtype=grad_dtype, device=first.device)
        self._words = torch.zeros(size, 2, dtype=torch.float64, device=first.device) if exact else None
        """The exact sums; `grads` then holds single gradients, and what is owned of the sum at the end."""
        share = size // axes.states.size
        self.start = axes.states.rank * share
        self.stop = self.start + share
        self.events: BucketEvents | None = None
        """Replaceable from outside: told when gradients are final, sent, and parameters whole."""
        self.slots = [self._adopt(number, member) for number, member in enumerate(members)]
        self._missing = 0
        self._reducing: Handle | None = None
        self._gathering: Handle | None = None
        self.before_reduction: Callable[[Bucket], None] = lambda bucket: None
        """Replaceable from outside: called when the reduction is about to start."""

    def _adopt(self, number: int, member: Member) -> Slot:
        view = self.flat[member.start : member.stop].view_as(member.param)
        if not self._adopts:
            view.copy_(member.param.data)
        member.param.data = view
        buffer, final = self.grads[member.start : member.stop].view_as(view), partial(self._one_final, number)
        words = self._words
        slot = Slot(buffer, final) if words is None else ExactSlot(buffer, final, words[member.start : member.stop])
        give_slot(member.param, slot)
        route(member.param)
        return slot

    # Gradients ------------------------------------------------------------------------------------------------

    def start_step(self, microbatches: int) -> None:
        """Before the first forward of a step. The reduction starts as soon as every gradient is final."""
        self._missing, self._reducing = len(self.slots), None
        for slot in self.slots:
            slot.start_step(microbatches)
        if self.events is not None:
            self.events.start_step()

    def _one_final(self, number: int) -> None:
        if self.events is not None:
            self.events.final(number)
        self._missing -= 1
        if self._missing == 0:
            self._launch()

    def _launch(self) -> None:
        for slot in self.slots if self._words is None else ():
            if slot.fresh:  # no token reached the parameter in this step
                slot.buffer.zero_()
        self.before_reduction(self)
        if self.events is not None:
            self.events.handed_over()
        if self.partial_axis.size == 1:
            self._reducing = self._reduce_over_data()
            return
        partial_sum = all_reduce(self._sums, self.partial_axis)

        def finish() -> Tensor:
            partial_sum.wait()
            return self._reduce_over_data().wait()

        self._reducing = Handle(self._sums, finish)

    @property
    def _sums(self) -> Tensor:
        """What is added up over the ranks, flat."""
        return self.grads if self._words is None else self._words.view(-1)

    def _reduce_over_data(self) -> Handle:
        states, copies = self.axes.states, self.axes.copies
        if states.size == 1:
            return all_reduce(self._sums, copies)
        each = len(self._sums) // len(self.grads)
        owned = self._sums[each * self.start : each * self.stop]
        scattered = reduce_scatter(self._sums, states, out=owned)
        if copies.size == 1:
            return scattered
        return Handle(owned, lambda: all_reduce(scattered.wait(), copies).wait())

    def reduce(self) -> None:
        """Every gradient of the bucket is final: returns when `owned_grad` is the sum over all ranks."""
        if self._reducing is None:
            self._launch()
        assert self._reducing is not None
        self._reducing.wait()
        if self._words is not None:
            self.owned_grad.copy_(from_words(self._words[self.start : self.stop]))

    @property
    def owned_grad(self) -> Tensor:
        """The reduced gradient of this rank's share, flat (n,)."""
        return self.grads[self.start : self.stop]

    @property
    def owned(self) -> Tensor:
        """The parameters of this rank's share, flat (n,)."""
        return self.flat[self.start : self.stop]

    @property
    def counted(self) -> bool:
        """Whether this rank's share enters the global norm; replicas enter it once."""
        return self.partial_axis.rank == 0 and self.axes.copies.rank == 0

    def clear(self) -> None:
        """Drops the step's gradients and forgets what is in flight, after a step that was left half-way."""
        self._reducing = self._gathering = None
        for member in self.members:
            member.param.grad = None

    # Parameters -----------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Starts handing every rank's updated share to all others."""
        if self.axes.states.size > 1:
            self._gathering = all_gather(self.owned, self.axes.states, out=self.flat)

    def wait_params(self) -> None:
        """Returns when the parameters are whole and new."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
            if self.events is not None:
                self.events.gathered()

    def shared(self, key: str) -> SharedBucket:
        """How the ranks share it; `key` names this rank's part."""
        members = tuple(SharedMember(m.name, m.sharding, m.start, m.param.numel()) for m in self.members)
        return SharedBucket(key, self.axes.states, self.stop - self.start, members)

    def copies(self) -> SharedCopies:
        """Who has the same parameters."""
        places = tuple(ParameterMemory("parameter", m.name, self.flat[m.start : m.stop]) for m in self.members)
        return SharedCopies((self.data, self.partial_axis), places)

    def owned_pieces(self) -> Iterator[tuple[Member, int, int, int]]:
        """(member, first and last element of the parameter, their place in the share) for what this rank owns."""
        for member in self.members:
            low, high = max(member.start, self.start), min(member.stop, self.stop)
            if low < high:
                yield member, low - member.start, high - member.start, low - self.start


def bucket_key(index: int) -> str:
    """Names a bucket of a rank."""
    return f"bucket{index}"


def _kept(kept: Mapping[str, Tensor], key: str, size: int, like: nn.Parameter) -> Tensor:
    return adopt(kept, key, (size,), like.dtype, like.device)


def decays(name: str, sharding: Sharding) -> bool:
    """Matrices do; vectors do not, nor the biases of experts, which are stacked."""
    return len(sharding.placement.global_shape) > 1 and not name.endswith("bias")


def make_buckets(
    params: Sequence[tuple[str, nn.Parameter, Sharding]],
    *,
    axes: Mapping[ReplicaFamily, SpreadAxes],
    partial_axes: dict[str, Axis],
    grad_dtype: torch.dtype,
    bucket_bytes: int,
    exact: bool = False,
    kept: Mapping[str, Tensor] | None = None,
) -> list[Bucket]:
    """Buckets of at most about `bucket_bytes` of parameters, in the order in which backward finishes them.

    `params` come in the order of the forward pass. `kept`: the memory of such buckets, by `bucket_key`, that these take
    over with the parameters in it.
    """
    make = partial(Bucket, grad_dtype=grad_dtype, exact=exact)
    open_kinds: dict[BucketKind, list[tuple[str, nn.Parameter, Sharding]]] = {}
    buckets: list[Bucket] = []

    def close(kind: BucketKind) -> None:
        key, summed = bucket_key(len(buckets)), partial_axes[kind.partial]
        flat = None if kept is None else partial(_kept, kept, key)
        buckets.append(make(kind, open_kinds.pop(kind), axes=axes[kind.family], partial=summed, flat=flat))

    for name, param, sharding in reversed(params):
        kind = BucketKind(sharding.family, sharding.partial, decay=decays(name, sharding))
        members = open_kinds.setdefault(kind, [])
        members.append((name, param, sharding))
        if sum(p.numel() * p.element_size() for _, p, _ in members) >= bucket_bytes:
            close(kind)
    for kind in list(open_kinds):
        close(kind)
    return buckets
