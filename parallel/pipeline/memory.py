"""How many activations a program holds at once on each rank, and how many bytes that is.

The activation of a (stage, microbatch) lives from the start of its F to the end of its W (or fused BW): a split
backward pass needs it until the weight gradient is done. In a program of forward passes only it ends with its F.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from .kind import Acts, Hold, Kind
from .program import Ops, Program
from .simulate import Curve, Timeline
from .times import one_each

_ELSEWHERE = ("host", "disk")


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """What one microbatch holds; a tuple of one element is for all stages or ranks.

    Args:
        activation: of a stage, from F to the end of B (or BW).
        deferred: what is left of it from there to the end of W; as much as before where None.
        offloaded: of a stage's activation, what is on the host between RELEASE and PREPARE, or on the disk between
            DROP and FETCH; all of it where None.
        head: of a rank's part of the vocabulary (logits, softmax, hidden states), from S to the end of T.
        parameters: of a stage whose parameters are spread, from their gather until they are given back.
        constant: of a rank, all the time (parameters, gradients, optimizer state, buffers).
    """

    activation: tuple[float, ...]
    deferred: tuple[float, ...] | None = None
    offloaded: tuple[float, ...] | None = None
    head: tuple[float, ...] = (0.0,)
    parameters: tuple[float, ...] = (0.0,)
    constant: tuple[float, ...] = (0.0,)


def peak_activations(program: Program) -> tuple[float, ...]:
    """The most that each rank holds at once, in activations of one microbatch of a rank's whole share.

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
    constant = one_each("constant", sizes.constant, len(program.ranks), "ranks")
    peaks = []
    for rank, ops in enumerate(program.ranks):
        held = peak = constant[rank]
        for _, _, change in _weighed(program, rank, ops, sizes):
            held += change
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def bytes_after(program: Program, sizes: ActivationBytes) -> tuple[tuple[float, ...], ...]:
    """What each rank holds after each of its operations.

    Raises:
        UserError: sizes for another number of stages or ranks.
    """
    constant = one_each("constant", sizes.constant, len(program.ranks), "ranks")
    found = []
    for rank, ops in enumerate(program.ranks):
        changes = [0.0] * len(ops)
        for position, _, change in _weighed(program, rank, ops, sizes):
            changes[position] += change
        found.append(tuple(accumulate(changes, initial=constant[rank]))[1:])
    return tuple(found)


def peak_host_bytes(program: Program, sizes: ActivationBytes, *, tier: str = "host") -> tuple[float, ...]:
    """The most bytes of each rank that are on the host at once, or on the disk (`tier`).

    Raises:
        UserError: sizes for another number of stages or ranks.
    """
    peaks = []
    for rank, ops in enumerate(program.ranks):
        held = peak = 0.0
        for _, _, change in _weighed(program, rank, ops, sizes, tier):
            held += change
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def slot_bytes(program: Program, sizes: ActivationBytes, pool: str) -> tuple[float, ...]:
    """The bytes of each rank's slabs ("slab"), or of its files on the disk ("file"): what is allocated for them, once.

    Raises:
        UserError: sizes for another number of stages.
    """
    given = sizes.activation if sizes.offloaded is None else sizes.offloaded
    each = one_each("offloaded", given, program.stages, "stages")
    found = []
    for ops in program.ranks:
        most: dict[int, float] = {}
        for op in ops:
            if op.kind.pool == pool:
                most[op.slot] = max(most.get(op.slot, 0.0), each[op.stage])
        found.append(sum(most.values()))
    return tuple(found)


def byte_curve(timeline: Timeline, sizes: ActivationBytes) -> tuple[Curve, ...]:
    """Bytes held over time on each rank.

    Raises:
        UserError: sizes for another number of stages or ranks.
    """
    program = timeline.program
    constant = one_each("constant", sizes.constant, len(program.ranks), "ranks")
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
    for position, hold in _held(ops):
        if hold.counts:
            yield position, int(hold.at_end), hold.sign


def _weighed(
    program: Program, rank: int, ops: Ops, sizes: ActivationBytes, where: str = ""
) -> Iterator[tuple[int, int, float]]:
    """As `_counted`, in bytes of the device, or of the host or the disk."""
    given = {
        "activation": sizes.activation,
        "deferred": sizes.activation if sizes.deferred is None else sizes.deferred,
        "offloaded": sizes.activation if sizes.offloaded is None else sizes.offloaded,
        "head": sizes.head,
        "parameters": sizes.parameters,
    }
    given["host"] = given["disk"] = given["offloaded"]
    places = {"stages": program.stages, "ranks": len(program.ranks)}
    per = dict.fromkeys(given, "stages") | {"head": "ranks"}
    each = {name: one_each(name, values, places[per[name]], per[name]) for name, values in given.items()}
    for position, at_end, changes in holds_of(ops):
        op = ops[position]
        place = op.stage if op.kind.acts is Acts.STAGE else rank
        here = [hold for hold in changes if hold.what == where or (where == "" and hold.what not in _ELSEWHERE)]
        yield position, at_end, sum(hold.sign * each[hold.what][place] for hold in here)


def holds_of(ops: Ops) -> Iterator[tuple[int, int, list[Hold]]]:
    """What changes at the start or the end of an operation of a rank, all at once: (its position, 0 at its start or 1
    at its end, what comes and goes)."""
    for (position, at_end), holds in groupby(_held(ops), lambda each: (each[0], each[1].at_end)):
        yield position, int(at_end), [hold for _, hold in holds]


def _held(ops: Ops) -> Iterator[tuple[int, Hold]]:
    """What each operation takes and gives back; what nothing in the list gives back goes at the end of its taker."""
    plans = _plans({op.kind for op in ops})
    for position, op in enumerate(ops):
        for hold in plans[op.kind]:
            yield position, hold


def _plans(kinds: set[Kind]) -> dict[Kind, tuple[Hold, ...]]:
    given_back = {hold.what for kind in kinds for hold in kind.holds if hold.sign < 0}
    return {
        kind: kind.holds
        + tuple(
            replace(hold, sign=-1, at_end=True) for hold in kind.holds if hold.sign > 0 and hold.what not in given_back
        )
        for kind in kinds
    }
