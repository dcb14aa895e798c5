"""Flat buckets: many parameters, one contiguous piece of memory, one collective.

Parameters whose gradients are treated alike (same family, same partial axis, same weight decay) share buckets, in the
order in which backward finishes them. A bucket holds the parameters, the sum of their gradients (or parts of them:
`parameters`, `gradient_sums`) and, where states are spread, which equal share of both each rank owns (`spread`):

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
from ..comm.collectives import Handle
from ..comm.mesh import Axis
from ..gradients import Slot, give_slot, route
from ..sharding_rules import Partial, ReplicaFamily, Sharding
from .gradient_sums import GradientSums, SpreadSums, SumPlace, WholeSums
from .parameters import SpreadParameters, WholeParameters, give_part
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
    stage: int = -1
    """Of the layers; −1: none, or those of all."""


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
        self._adopts, part = flat is not None, size // axes.params.size
        held = flat(part, first) if flat else torch.zeros(part, dtype=first.dtype, device=first.device)
        self.params = SpreadParameters(held, axes) if axes.params.size > 1 else WholeParameters(held, axes)
        self.flat = self.params.flat
        share = size // axes.states.size
        self.start = axes.share * share
        self.stop = self.start + share
        spans = [(m.start, m.stop, m.param.shape) for m in self.members]
        place = SumPlace(spans, size, axes, partial, grad_dtype, first.device, exact)
        self.sums: GradientSums = SpreadSums(place, self) if axes.grads.size > 1 else WholeSums(place, self)
        self.events: BucketEvents | None = None
        """Replaceable from outside: told when gradients are final, sent, and parameters whole."""
        self.slots = self.sums.slots
        for member, slot in zip(self.members, self.slots, strict=True):
            self._adopt(member, slot)
        self.params.drop()
        self._gathering: Handle | None = None
        self.before_reduction: Callable[[Bucket], None] = lambda bucket: None
        """Replaceable from outside: called when the reduction is about to start."""

    def _adopt(self, member: Member, slot: Slot) -> None:
        if not self._adopts and member.param.untyped_storage().nbytes():
            self.put(member, member.param.data)
        member.param.data = self.flat[member.start : member.stop].view_as(member.param)
        if self.axes.params.size > 1:
            give_part(member.param, self._part(member)[1])
        give_slot(member.param, slot)
        route(member.param)

    # Gradients ------------------------------------------------------------------------------------------------

    def start_step(self, microbatches: int) -> None:
        """Before the first forward of a step. A reduction starts as soon as every gradient is there."""
        self.sums.start_step(microbatches)
        if self.events is not None:
            self.events.start_step()

    def before_sums(self) -> None:
        """Of `SumHooks`."""
        self.before_reduction(self)

    def final(self, number: int) -> None:
        """Of `SumHooks`."""
        if self.events is not None:
            self.events.final(number)

    def handed_over(self) -> None:
        """Of `SumHooks`."""
        if self.events is not None:
            self.events.handed_over()

    def reduce(self) -> None:
        """Every gradient of the bucket is final: returns when `owned_grad` is the sum over all ranks."""
        self.sums.reduce()

    @property
    def owned_grad(self) -> Tensor:
        """The reduced gradient of this rank's share, flat (n,)."""
        return self.sums.owned

    @property
    def owned(self) -> Tensor:
        """The parameters of this rank's share, flat (n,)."""
        first = self.params.first
        return self.params.held[self.start - first : self.stop - first]

    @property
    def counted(self) -> bool:
        """Whether this rank's share enters the global norm; replicas enter it once."""
        return self.partial_axis.rank == 0 and self.axes.copies.rank == 0

    def clear(self) -> None:
        """Drops the step's gradients and forgets what is in flight, after a step that was left half-way."""
        self._gathering = None
        self.params.forget()
        self.sums.clear()
        for member in self.members:
            member.param.grad = None

    # Parameters -----------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Starts handing every rank's updated share to all others."""
        self._gathering = self.params.gather(self.owned)

    def put(self, member: Member, value: Tensor) -> None:
        """Sets what this rank holds of a parameter from its value, of any shape."""
        at, part = self._part(member)
        part.copy_(value.reshape(-1)[at : at + len(part)])

    def _part(self, member: Member) -> tuple[int, Tensor]:
        """What this rank holds of a parameter all the time, and where in it that begins."""
        first, held = self.params.first, self.params.held
        low = min(max(member.start, first), member.stop)
        high = max(low, min(member.stop, first + len(held)))
        return low - member.start, held[low - first : high - first] if high > low else held[:0]

    def collect(self) -> None:
        """Starts making spread parameters whole."""
        self.wait_params()
        self.params.collect()

    def wait_params(self) -> None:
        """Returns when what this rank holds of the parameters is new."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
            if self.events is not None:
                self.events.gathered()

    def shared(self, key: str) -> SharedBucket:
        """How the ranks share it; `key` names this rank's part."""
        members = tuple(SharedMember(m.name, m.sharding, m.start, m.param.numel()) for m in self.members)
        return SharedBucket(key, self.axes.states, self.stop - self.start, self.axes.share, members)

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
    stage_of: Callable[[str], int],
    kept: Mapping[str, Tensor] | None = None,
) -> list[Bucket]:
    """Buckets of at most about `bucket_bytes` of parameters, in the order in which backward finishes them.

    Where gradients or parameters are spread, a bucket has parameters of one (part-)stage, which `stage_of` tells by
    name: they are all through when a microbatch's backward pass of that stage is, and whole for its passes. `params`
    come in the order of the forward pass. `kept`: the memory of such buckets, by `bucket_key`, that these take over
    with the parameters in it.
    """
    make = partial(Bucket, grad_dtype=grad_dtype, exact=exact)
    open_kinds: dict[BucketKind, list[tuple[str, nn.Parameter, Sharding]]] = {}
    buckets: list[Bucket] = []

    def close(kind: BucketKind) -> None:
        key, summed = bucket_key(len(buckets)), partial_axes[kind.partial]
        flat = None if kept is None else partial(_kept, kept, key)
        mine = axes[kind.family] if kind.stage >= 0 else axes[kind.family].whole
        buckets.append(make(kind, open_kinds.pop(kind), axes=mine, partial=summed, flat=flat))

    for name, param, sharding in reversed(params):
        stage = stage_of(name) if axes[sharding.family].grads.size > 1 else -1
        kind = BucketKind(sharding.family, sharding.partial, decays(name, sharding), stage)
        members = open_kinds.setdefault(kind, [])
        members.append((name, param, sharding))
        if sum(p.numel() * p.element_size() for _, p, _ in members) >= bucket_bytes:
            close(kind)
    for kind in list(open_kinds):
        close(kind)
    return buckets
