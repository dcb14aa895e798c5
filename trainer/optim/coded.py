"""Which moments of a bucket are coded, where codes and scales lie, and which scales other ranks have too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallel.comm.mesh import Axis, Mesh
from ...parallel.replicas.protocol import ShardSlice, SharedBucket, SharedMember
from ...parallel.sharding_rules import Sharding
from .quantiser import Blocks, Code, ElementRun, RowsAndColumns


@dataclass(frozen=True)
class CodedRun:
    """A run of a parameter's elements whose moment is coded.

    Args:
        name, sharding: of the parameter.
        code: of the moment.
        scales: which it has.
        part: its elements in the unit.
        codes, scale: their places in what the unit's moment is kept in.
    """

    name: str
    sharding: Sharding
    code: Code
    scales: Blocks | RowsAndColumns
    part: slice
    codes: slice
    scale: slice


@dataclass(frozen=True)
class PlainRun:
    """Elements [start, stop) of the rank's slice of a parameter, whose moments are kept as they are.

    Args:
        part, place: of these elements in the unit, and in what the unit's moment is kept in.
    """

    name: str
    sharding: Sharding
    start: int
    stop: int
    part: slice
    place: slice


@dataclass(frozen=True)
class ScaleExchange:
    """Scales of which several ranks of an axis have some, to be reduced together.

    Args:
        axis: of these ranks.
        size: of what is reduced.
        parts: (state, entries of what is reduced, the same among the state's scales).
    """

    axis: Axis
    size: int
    parts: tuple[tuple[str, Tensor, Tensor], ...]


@dataclass(frozen=True)
class CodedBucket:
    """What a rank keeps of the moments of a bucket's share.

    Args:
        coded: by state.
        plain: of every state.
        exchanges: in the order in which every rank makes them.
    """

    coded: dict[str, tuple[CodedRun, ...]]
    plain: tuple[PlainRun, ...]
    exchanges: tuple[ScaleExchange, ...]

    @property
    def alone(self) -> bool:
        """Whether no other rank has anything of the same matrices."""
        return not self.exchanges


def is_coded(shape: Sequence[int], above: int) -> bool:
    """Whether the moments of a parameter are coded: a matrix of it, as that of one expert, has more elements."""
    return len(shape) in (2, 3) and shape[-2] * shape[-1] > above


def coded_bucket(
    codes: dict[str, Code], above: int, bucket: SharedBucket, mesh: Mesh, device: torch.device
) -> CodedBucket:
    """The plan of a bucket.

    Args:
        codes: of the states.
        above: see `is_coded`.
        bucket: how it is shared.
        mesh: of this rank.
        device: of the scales.
    """
    coded: dict[str, list[CodedRun]] = {state: [] for state in codes}
    plain: list[PlainRun] = []
    exchanges = _Exchanges(mesh, bucket.axis, device)
    for number, member in enumerate(bucket.members):
        mine = bucket.own(member)
        if not is_coded(member.sharding.placement.global_shape, above):
            if mine is not None:
                at = plain[-1].place.stop if plain else 0
                place = slice(at, at + mine.stop - mine.start)
                plain.append(PlainRun(member.name, member.sharding, mine.start, mine.stop, _part(mine), place))
            continue
        for state, code in codes.items():
            held = None
            if mine is not None:
                run = run_of(member.sharding, mine.start, mine.stop)
                held = _coded_run(member, code, run, _part(mine), coded[state])
                coded[state].append(held)
            for axis, ids in shared_ids(member, code, bucket, mesh):
                # Other stages have the vocabulary's tables in other buckets: one at a time.
                exchanges.add(axis, number if axis == "world" else -1, state, ids, held)
    return CodedBucket({state: tuple(runs) for state, runs in coded.items()}, tuple(plain), exchanges.made())


def _part(mine: ShardSlice) -> slice:
    return slice(mine.at, mine.at + mine.stop - mine.start)


def run_of(sharding: Sharding, start: int, stop: int) -> ElementRun:
    """Elements [start, stop) of the rank's slice of a parameter."""
    place = sharding.placement
    one = len(place.global_shape) == 2
    whole, shape = ((1, *each) if one else each for each in (place.global_shape, place.local_shape))
    offsets = (0, *place.offsets) if one else place.offsets
    return ElementRun(whole, shape, offsets, start, stop)  # pyright: ignore[reportArgumentType]  # three of each


def _coded_run(member: SharedMember, code: Code, run: ElementRun, part: slice, before: list[CodedRun]) -> CodedRun:
    scales = Blocks(run, code.block) if code.block else RowsAndColumns(run)
    at, scale = (before[-1].codes.stop, before[-1].scale.stop) if before else (0, 0)
    codes, scale = slice(at, at + code.packed(run.count)), slice(scale, scale + scales.count)
    return CodedRun(member.name, member.sharding, code, scales, part, codes, scale)


# Shared scales ----------------------------------------------------------------------------------------------------


def cut_over(sharding: Sharding, mesh: Mesh) -> str:
    """The axis over which the matrices of a parameter are cut; empty: they are whole."""
    place = sharding.placement
    cuts = max(n // m for n, m in zip(place.global_shape[-2:], place.local_shape[-2:], strict=True))
    if cuts == 1:
        return ""
    if sharding.family == "expert":
        return "etp"
    return "tp" if cuts <= mesh.axis("tp").size else "world"  # the balanced vocabulary's tables


def shared_ids(member: SharedMember, code: Code, bucket: SharedBucket, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """(axis, numbers) of a member's scales that other ranks of the axis may have parts of: the numbers of `Blocks` and
    `RowsAndColumns`, −1 for one that is not of this rank's slice. As many on every rank of the axis."""
    slice_ = run_of(member.sharding, 0, member.count)
    axis = cut_over(member.sharding, mesh)
    borders = bucket.borders(member)
    whole = Blocks(slice_, code.block) if code.block else RowsAndColumns(slice_)
    if borders:
        # A row with a border may have its last block on a rank that is neither of the same share nor of the same cut.
        yield "data", whole.ids_of_rows(sorted({border // slice_.shape[2] for border in borders}))
    if axis:
        yield axis, whole.ids_of_cuts()


class _Exchanges:
    """The exchanges of one bucket as they come about."""

    def __init__(self, mesh: Mesh, data: Axis, device: torch.device) -> None:
        self._mesh, self._data, self._device = mesh, data, device
        self._parts: dict[tuple[str, int], list[tuple[str, Tensor, Tensor]]] = {}
        self._sizes: dict[tuple[str, int], int] = {}

    def add(self, axis: str, number: int, state: str, ids: Tensor, held: CodedRun | None) -> None:
        """Scales `ids`, of which this rank has those of its run."""
        key = (axis, number)
        at = self._sizes.get(key, 0)
        self._sizes[key] = at + len(ids)
        if held is None:
            return
        place = held.scales.places(ids)
        there = torch.nonzero(place >= 0).view(-1)
        here = place[there] + held.scale.start
        self._parts.setdefault(key, []).append((state, (there + at).to(self._device), here.to(self._device)))

    def made(self) -> tuple[ScaleExchange, ...]:
        """Over shares first: all of them then know what they tell the ranks of other cuts."""
        order = sorted((key for key, size in self._sizes.items() if size), key=lambda key: (_ORDER[key[0]], key[1]))
        return tuple(
            ScaleExchange(self._axis(key[0]), self._sizes[key], tuple(self._parts.get(key, ()))) for key in order
        )

    def _axis(self, name: str) -> Axis:
        return self._data if name == "data" else self._mesh.axis(name)


_ORDER = {"data": 0, "tp": 1, "etp": 1, "world": 2}
