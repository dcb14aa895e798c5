"""How long each operation takes: what the simulator is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from statistics import median
from typing import Any

from ...configs.errors import Problem, UserError
from .kind import Acts, Kind, Role
from .needs import KINDS, Kinds
from .program import Op

_ZERO = (0.0,)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Durations in any one unit of time; a tuple of one element holds for every stage (or rank).

    Args:
        forward, backward, weight: F, B and W of one microbatch, per stage. A fused backward takes backward + weight.
        head, head_grad, embed, embed_grad: S, T, IF and IB of one microbatch, per rank.
        reduce, optimize, gather: RG, OPT and AG of one bucket, per rank.
        norm: of NORM, from the last rank's start to its end.
        hop: from the end of a send's source operation to the arrival at another rank; occupies no compute.
        link: what a message adds to that, its bytes over the bandwidth, and for how long it occupies its link: the next
            one from the same rank to the same rank has to wait. A program of compute only has no order of messages, so
            there they are added and nobody waits.
        collective: of each collective of the vocabulary, from the last rank's start to its end; occupies no compute.
        offload, reload: of the copies of what a stage keeps of one microbatch, per stage; they occupy no compute.
        store, fetch: of those between host and disk, likewise.
        collect: of gathers of a stage's parameters, per stage; they occupy no compute.
        one_engine: one copy between device and host at a time in either direction, not one in each.
        other: of kinds that have no field of their own, by token: per stage or rank, as the kind acts.

    Raises:
        UserError: a duration is negative or not a number, or a tuple is empty.
    """

    forward: tuple[float, ...] = (1.0,)
    backward: tuple[float, ...] = (1.0,)
    weight: tuple[float, ...] = (1.0,)
    head: tuple[float, ...] = _ZERO
    head_grad: tuple[float, ...] = _ZERO
    embed: tuple[float, ...] = _ZERO
    embed_grad: tuple[float, ...] = _ZERO
    reduce: tuple[float, ...] = _ZERO
    optimize: tuple[float, ...] = _ZERO
    gather: tuple[float, ...] = _ZERO
    norm: float = 0.0
    hop: float = 0.0
    link: float = 0.0
    collective: float = 0.0
    offload: tuple[float, ...] = _ZERO
    reload: tuple[float, ...] = _ZERO
    store: tuple[float, ...] = _ZERO
    fetch: tuple[float, ...] = _ZERO
    collect: tuple[float, ...] = _ZERO
    one_engine: bool = False
    other: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        given = {each.name: getattr(self, each.name) for each in fields(self)} | dict(self.other)
        del given["other"], given["one_engine"]
        for name, value in given.items():
            values = value if isinstance(value, tuple) else (value,)
            bad = [v for v in values if not (isfinite(v) and v >= 0)]
            if bad:
                problems.append(Problem(name, f"a duration is at least 0, got {bad[0]}"))
            if not values:
                problems.append(Problem(name, "no durations: give one for all, or one per stage (or rank)"))
        if problems:
            raise UserError(*problems)

    @staticmethod
    def from_spans(
        spans: Iterable[tuple[int, Op, float, float]],
        placement: Sequence[int],
        *,
        hop: float = 0.0,
        collective: float = 0.0,
        weight_share: float = 0.5,
    ) -> Times:
        """The median duration of each kind at each stage or rank of a recorded run.

        Args:
            spans: (rank of the pipeline axis, operation, start, end) of operations that did not wait in between.
            placement: the rank of each stage.
            weight_share: the part of a fused backward that counts as weight gradient, where the run has no B and W.

        Raises:
            UserError: a stage has no forward in the record.
        """
        measured: dict[tuple[Kind, int], list[float]] = {}
        for rank, op, start, end in spans:
            place = op.stage if op.kind.acts is Acts.STAGE else rank
            measured.setdefault((op.kind, place), []).append(end - start)
        stages, ranks = len(placement), max(placement) + 1
        medians = {key: median(values) for key, values in measured.items()}
        for stage in range(stages):
            if (Kinds.FORWARD, stage) not in medians:
                raise UserError(f"the record has no forward pass of stage {stage} (of {stages}): give its times")
            fused = medians.get((Kinds.BACKWARD, stage), 0.0)
            medians.setdefault((Kinds.INPUT_GRAD, stage), fused * (1 - weight_share))
            medians.setdefault((Kinds.WEIGHT_GRAD, stage), fused * weight_share)
        found: dict[str, Any] = {"other": {}}
        for kind in KINDS.values():
            if kind.fuses or kind.communicates or kind.acts is Acts.STEP or kind.role is Role.COPY:
                continue  # of a copy, as of a transfer, the list has only the start
            count = stages if kind.acts is Acts.STAGE else ranks
            values = tuple(medians.get((kind, i), 0.0) for i in range(count))
            if kind.duration:
                found[kind.duration[0]] = values
            elif any(values):
                found["other"][kind.token] = values
        return Times(**found, hop=hop, collective=collective)

    def of(self, op: Op, rank: int) -> float:
        """How long an operation occupies its rank; 0 for everything that is only started."""
        return 0.0 if op.kind.started else self.latency(op, rank)

    def latency(self, op: Op, rank: int) -> float:
        """How long an operation takes, whether or not it occupies its rank; transfers and collectives apart."""
        place = op.stage if op.kind.acts is Acts.STAGE else rank
        return sum(_at(values, place) for values in self._durations(op.kind))

    def _durations(self, kind: Kind) -> list[tuple[float, ...]]:
        if kind.duration:
            return [getattr(self, name) for name in kind.duration]
        return [self.other.get(kind.token, _ZERO)]

    def expect(self, stages: int, ranks: int) -> None:
        """Checks that every duration is for one or for so many stages or ranks.

        Raises:
            UserError: one is not.
        """
        for kind in KINDS.values():
            if kind.acts is Acts.STEP or kind.communicates:
                continue
            per_stage = kind.acts is Acts.STAGE
            for name, values in zip(kind.duration or (kind.token,), self._durations(kind), strict=True):
                one_each(name, values, stages if per_stage else ranks, "stages" if per_stage else "ranks")


def _at(values: tuple[float, ...], index: int) -> float:
    return values[0] if len(values) == 1 else values[index]


def by_rank(placement: tuple[int, ...], chunks: int, per_rank: tuple[float, ...]) -> tuple[float, ...]:
    """Times per stage from times of one rank's whole share: a chunk takes 1/chunks of it."""
    return tuple(_at(per_rank, rank) / chunks for rank in placement)


def one_each(name: str, values: tuple[float, ...], count: int, things: str) -> list[float]:
    """One duration for each of `count` stages or ranks.

    Raises:
        UserError: neither one value nor `count`.
    """
    if len(values) not in (1, count):
        raise UserError(Problem(name, f"{len(values)} times for {count} {things}: give 1, or {count}"))
    return [values[0]] * count if len(values) == 1 else list(values)
