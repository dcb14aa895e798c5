"""Data parallelism: how replicas share parameters, gradients and optimizer states.

Whatever the kind, the trainer sees the same few verbs, which are operations of the step's program: begin a backward,
reduce a bucket, hand out the pieces to optimize, gather a bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..checksum import ParameterMemory
from ..comm.mesh import Axis, Mesh
from ..gradients import slot_of
from ..pipeline.execute import Handler
from ..pipeline.kind import Kind
from ..sharding_rules import Partial, Sharding


@dataclass(frozen=True)
class OptimizerShard:
    """A flat piece of the model that this rank optimizes.

    Args:
        key: names the unit, the same in every step.
        value: what the optimizer updates (1-D): the fp32 master, or the parameters themselves.
        grad: its reduced gradient (1-D).
        rounded: bf16 parameters that follow `value`, or None.
        decay: whether weight decay applies.
        counted: whether this rank counts the piece in the global norm.
    """

    key: str
    value: Tensor
    grad: Tensor
    rounded: Tensor | None
    decay: bool
    counted: bool


@dataclass(frozen=True)
class ShardSlice:
    """A run of a parameter's elements inside a unit: parameter elements [start, stop) are unit elements [at, …)."""

    name: str
    sharding: Sharding
    start: int
    stop: int
    unit: str
    at: int


@dataclass(frozen=True)
class SharedMember:
    """A parameter in a bucket: elements [start, start + count), in row-major order of the rank's slice."""

    name: str
    sharding: Sharding
    start: int
    count: int


@dataclass(frozen=True)
class SharedBucket:
    """Parameters of which each rank of an axis updates an equal share, one after another.

    Args:
        key: of the unit that is this rank's share.
        axis: of the ranks; of size 1 where each updates everything.
        share: elements.
        place: of this rank's share among all, from 0 on.
        members: in their order.
    """

    key: str
    axis: Axis
    share: int
    place: int
    members: tuple[SharedMember, ...]

    def own(self, member: SharedMember) -> ShardSlice | None:
        """What this rank updates of a member."""
        first = self.place * self.share
        low, high = max(member.start, first), min(member.start + member.count, first + self.share)
        if low >= high:
            return None
        start, stop = low - member.start, high - member.start
        return ShardSlice(member.name, member.sharding, start, stop, self.key, low - first)

    def borders(self, member: SharedMember) -> list[int]:
        """The elements of a member before which another rank's share begins."""
        first = member.start // self.share + 1
        return [border - member.start for border in range(first * self.share, member.start + member.count, self.share)]


@dataclass(frozen=True)
class SharedCopies:
    """Parameters of which several ranks hold copies, equal to the bit when no gather is in flight.

    Args:
        axes: every rank of the first axis, on every rank of the second, holds them.
        places: of this rank's copies, the same parameters in the same order on each.
    """

    axes: tuple[Axis, Axis]
    places: tuple[ParameterMemory, ...]


class BucketEvents(Protocol):
    """Who is told when a bucket's memory may be changed and when not."""

    def start_step(self) -> None: ...
    def final(self, number: int) -> None: ...
    def handed_over(self) -> None: ...
    def gathered(self) -> None: ...


class OtherSlices(ValueError):
    """What was kept of a model are not the slices that are wanted now."""


def adopt(
    kept: Mapping[str, Tensor], key: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The memory that was kept under `key`.

    Raises:
        OtherSlices: there is none, or it is not what is wanted.
    """
    found = kept.get(key)
    if found is None or (tuple(found.shape), found.dtype, found.device) != (tuple(shape), dtype, device):
        raise OtherSlices(f"{key} is not {tuple(shape)} of {dtype} on {device}")
    return found


class Replicas(Protocol):
    """One model's data parallelism."""

    buckets: int
    """Number of buckets, which the program reduces, optimizes and gathers one by one."""

    @property
    def handlers(self) -> dict[Kind, Handler]: ...
    def start_step(self, microbatches: int) -> None: ...
    def begin_microbatch(self) -> None: ...
    def reduce(self, bucket: int) -> None: ...
    def units(self, bucket: int) -> list[OptimizerShard]: ...
    def shared(self, bucket: int) -> SharedBucket | None: ...
    def gather(self, bucket: int) -> None: ...
    def copies(self) -> list[SharedCopies]: ...
    def pieces(self) -> Iterator[ShardSlice]: ...
    def load(self, values: Iterable[tuple[str, Tensor]]) -> None: ...
    def sync_params(self) -> None: ...
    def wait_gathers(self) -> None: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...
    def keep(self) -> dict[str, Tensor]: ...


def partial_axes(mesh: Mesh) -> dict[str, Axis]:
    """The axis over which gradients of each kind of partial sum are added up."""
    names: tuple[Partial, ...] = ("", "tp", "tp_replica", "ends", "etp")
    return {name: mesh.axis(name) if name else Axis.single("") for name in names}


def expect_uses(weight: Tensor, uses: int) -> None:
    """This rank uses the weight so often in every microbatch: its gradient is final after as many additions each."""
    slot = slot_of(weight)
    if slot is not None:
        slot.uses = uses
