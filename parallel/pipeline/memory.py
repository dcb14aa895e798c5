"""How many activations a program holds at once on each rank, and how many bytes that is.

The activation of a (stage, micro-batch) lives from the start of its F to the end of its W (or fused BW): a split
backward pass needs it until the weight gradient is done. In a program of forward passes only it ends with its F.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .program import Kind, Ops, Program
from .simulate import Timeline
from .times import spread

Curve = tuple[tuple[float, float], ...]
"""(time, amount from then on), in the order of time."""

_ENDS = frozenset({Kind.WEIGHT_GRAD, Kind.BACKWARD})


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """What one micro-batch holds; a tuple of one element is for all stages or ranks.

    Args:
        activation: of a stage, from F to the end of B (or BW).
        deferred: what is left of it from there to the end of W; as much as before where None.
        head: of a rank's part of the vocabulary (logits, softmax, hidden states), from S to the end of T.
        constant: of a rank, all the time (parameters, gradients, optimizer state, buffers).
    """

    activation: tuple[float, ...]
    deferred: tuple[float, ...] | None = None
    head: tuple[float, ...] = (0.0,)
    constant: tuple[float, ...] = (0.0,)


def peak_activations(program: Program) -> tuple[float, ...]:
    """The most that each rank holds at once, in activations of one micro-batch of a rank's whole share.

    One chunk counts 1/chunks. The order of the list decides it, whatever the times.
    """
    peaks = []
    for ops in program.ranks:
        held = peak = 0
        for _, _, change in _counted(ops):
            held += change
            peak = max(peak, held)
        peaks.append(peak / program.chunks)
    return tuple(peaks)


def activation_curve(timeline: Timeline) -> tuple[Curve, ...]:
    """Activations held over time on each rank, in the unit of `peak_activations`."""
    chunks = timeline.program.chunks
    curves = []
    for ops, spans in zip(timeline.program.ranks, timeline.spans, strict=True):
        held, curve = 0, []
        for position, at_end, change in _counted(ops):
            held += change
            curve.append((spans[position][at_end], held / chunks))
        curves.append(tuple(curve))
    return tuple(curves)


def peak_bytes(program: Program, sizes: ActivationBytes) -> tuple[float, ...]:
    """The most bytes that each rank holds at once.

    Raises:
        UserError: sizes for another number of stages or ranks.
    """
    constant = spread("constant", sizes.constant, len(program.ranks), "ranks")
    peaks = []
    for rank, ops in enumerate(program.ranks):
        held = peak = constant[rank]
        for _, _, change in _weighed(program, rank, ops, sizes):
            held += change
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def byte_curve(timeline: Timeline, sizes: ActivationBytes) -> tuple[Curve, ...]:
    """Bytes held over time on each rank.

    Raises:
        UserError: sizes for another number of stages or ranks.
    """
    program = timeline.program
    constant = spread("constant", sizes.constant, len(program.ranks), "ranks")
    curves = []
    for rank, (ops, spans) in enumerate(zip(program.ranks, timeline.spans, strict=True)):
        held = constant[rank]
        curve = [(0.0, held)]
        for position, at_end, change in _weighed(program, rank, ops, sizes):
            held += change
            curve.append((spans[position][at_end], held))
        curves.append(tuple(curve))
    return tuple(curves)


def _counted(ops: Ops) -> Iterator[tuple[int, int, int]]:
    """(position, 0 at its start or 1 at its end, +1 or -1) of each activation that comes or goes."""
    trains = any(op.kind in _ENDS for op in ops)
    for position, op in enumerate(ops):
        if op.kind is Kind.FORWARD:
            yield position, 0, 1
            if not trains:
                yield position, 1, -1
        elif op.kind in _ENDS:
            yield position, 1, -1


def _weighed(program: Program, rank: int, ops: Ops, sizes: ActivationBytes) -> Iterator[tuple[int, int, float]]:
    """As `_counted`, in bytes."""
    full = spread("activation", sizes.activation, program.stages, "stages")
    rest = full if sizes.deferred is None else spread("deferred", sizes.deferred, program.stages, "stages")
    head = spread("head", sizes.head, len(program.ranks), "ranks")[rank]
    kinds = {op.kind for op in ops}
    trains, keeps_head = not _ENDS.isdisjoint(kinds), Kind.HEAD_GRAD in kinds
    for position, op in enumerate(ops):
        match op.kind:
            case Kind.FORWARD:
                yield position, 0, full[op.stage]
                if not trains:
                    yield position, 1, -full[op.stage]
            case Kind.INPUT_GRAD:
                yield position, 1, rest[op.stage] - full[op.stage]
            case Kind.WEIGHT_GRAD:
                yield position, 1, -rest[op.stage]
            case Kind.BACKWARD:
                yield position, 1, -full[op.stage]
            case Kind.HEAD:
                yield position, 0, head
                if not keeps_head:
                    yield position, 1, -head
            case Kind.HEAD_GRAD:
                yield position, 1, -head
