"""What the pictures state beside the boxes: idle time and activations of each rank, and what each wait was for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..communication import data_needs
from ..memory import peak_activations
from ..needs import Kinds
from ..program import Op
from ..readings import utilization
from ..simulate import Timeline


@dataclass(frozen=True)
class OpBox:
    """An operation that took time."""

    rank: int
    op: Op
    start: float
    end: float


def op_boxes(timeline: Timeline) -> list[OpBox]:
    """Operations that took time, rank by rank."""
    return [
        OpBox(rank, op, start, end)
        for rank, (ops, spans) in enumerate(zip(timeline.program.ranks, timeline.spans, strict=True))
        for op, (start, end) in zip(ops, spans, strict=True)
        if op.kind.drawn and end > start
    ]


def copies(timeline: Timeline) -> list[OpBox]:
    """Copies between device and host while their engine runs them, as simulated."""
    return [
        OpBox(rank, op, end - timeline.times.latency(op, rank), end)
        for rank, (ops, spans) in enumerate(zip(timeline.program.ranks, timeline.spans, strict=True))
        for op, (_, end) in zip(ops, spans, strict=True)
        if op.kind.engine and timeline.times.latency(op, rank) > 0
    ]


def chunk_of(timeline: Timeline) -> list[int]:
    """For each stage, which of its rank's stages it is, from 0."""
    where = timeline.program.placement
    return [where[:stage].count(rank) for stage, rank in enumerate(where)]


@dataclass(frozen=True)
class Figures:
    """Totals of a timeline.

    Args:
        end: of the last computation.
        longest: the rank with the longest span.
        bubble: rate, as in `readings.Utilization.bubble_rate`: the idle share of that rank.
        idle: per rank, the share of its span that it does not compute.
        peak: per rank, activations in microbatches.
    """

    end: float
    longest: int
    bubble: float
    idle: tuple[float, ...]
    peak: tuple[float, ...]


def figures(timeline: Timeline) -> Figures:
    """Totals of a timeline; operations of the update do not count."""
    used = utilization(timeline)
    idle = tuple(idle / span if span else 0.0 for idle, span in zip(used.idle, used.span, strict=True))
    end = max((box.end for box in op_boxes(timeline) if box.op.kind.computes), default=0.0)
    return Figures(end, used.longest, used.bubble_rate, idle, peak_activations(timeline.program))


def causes(timeline: Timeline, least: float) -> Iterator[tuple[OpBox, OpBox]]:
    """(what was waited for, what waited) for every wait longer than `least` for an operation of another rank."""
    found = {(box.rank, _as_need(box.op)): box for box in op_boxes(timeline)}
    before: dict[int, float] = {}
    for box in op_boxes(timeline):
        idle = box.start - before.get(box.rank, 0.0)
        before[box.rank] = box.end
        if idle <= least or not box.op.kind.computes:
            continue
        needs = [found[need] for need in data_needs(timeline.program, box.op) if need in found]
        latest = max(needs, key=lambda need: need.end, default=None)
        if latest is not None and latest.rank != box.rank:
            yield latest, box


def stage_flows(timeline: Timeline) -> Iterator[tuple[OpBox, OpBox]]:
    """(sender, receiver) of every hand-over between stages on different ranks."""
    found = {(box.rank, _as_need(box.op)): box for box in op_boxes(timeline)}
    for box in op_boxes(timeline):
        if not box.op.kind.of_stage:
            continue
        for rank, need in data_needs(timeline.program, box.op):
            source = found.get((rank, need))
            if source is not None and rank != box.rank and need.kind.of_stage:
                yield source, box


def _as_need(op: Op) -> Op:
    """`data_needs` names every backward pass B."""
    return Op(Kinds.INPUT_GRAD, op.index, op.stage) if op.kind is Kinds.BACKWARD else op
