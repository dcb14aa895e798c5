"""Gathers of spread parameters as a pass: where in each rank's list a stage's parameters come and go.

A stage whose parameters are spread over the replicas has them whole for its passes only. The pass puts three operations
around each run of passes through one stage:

    PF3@0 … HF3@0 F3@0 DF3@0 … PB3@0 … HB3@0 B3@0 DB3@0

P starts the gather, H waits for it, D gives the memory back. Passes of one stage that follow each other, as a last
stage's forward and backward pass, share a gather: what D would give back is wanted at once. A gather starts when the
run before it does, thus two stages of a rank are whole at a time: the one at work and the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from ..pipeline.kind import Kind
from ..pipeline.needs import Kinds
from ..pipeline.program import Op, Ops, Program

_FORWARD = Kinds.COLLECT_FORWARD, Kinds.HAVE_FORWARD, Kinds.DROP_FORWARD
_BACKWARD = Kinds.COLLECT_BACKWARD, Kinds.HAVE_BACKWARD, Kinds.DROP_BACKWARD
_AROUND: Mapping[Kind, tuple[Kind, Kind, Kind]] = {
    Kinds.FORWARD: _FORWARD,
    Kinds.BACKWARD: _BACKWARD,
    Kinds.INPUT_GRAD: _BACKWARD,
}
"""What stands around each kind of pass that reads parameters."""


@dataclass(frozen=True)
class StageUse:
    """Passes of a rank through one stage, one after another, between which it does not compute for another stage.

    Args:
        first, last: their positions in the rank's list.
    """

    first: int
    last: int


def collecting(program: Program, stages: Collection[int], *, ahead: bool = True) -> Program:
    """The program with gathers of the parameters of these stages.

    Args:
        program: complete but for the update, of a training step or an evaluation.
        stages: whose parameters are spread.
        ahead: a gather starts when the passes before it do; else where it is waited for.
    """
    wanted = frozenset(stages)
    return replace(program, ranks=tuple(_with_gathers(ops, wanted, ahead=ahead) for ops in program.ranks))


def stage_uses(ops: Ops, stages: Collection[int]) -> list[StageUse]:
    """The runs of passes of a rank's list that need parameters of these stages."""
    found: list[StageUse] = []
    for position, op in enumerate(ops):
        if op.kind in _AROUND and op.stage in stages:
            if found and ops[found[-1].first].stage == op.stage:
                found[-1] = StageUse(found[-1].first, position)
            else:
                found.append(StageUse(position, position))
    return found


def _with_gathers(ops: Ops, stages: frozenset[int], *, ahead: bool) -> Ops:
    uses = stage_uses(ops, stages)
    before: dict[int, list[Op]] = {use.first: [] for use in uses}
    after: dict[int, Op] = {}
    for number, use in enumerate(uses):
        first, last = ops[use.first], ops[use.last]
        start = uses[max(0, number - 1)].first if ahead else use.first
        before[start].append(Op(_AROUND[first.kind][0], first.index, first.stage))
        after[use.last] = Op(_AROUND[last.kind][2], last.index, last.stage)
    for use in uses:
        first = ops[use.first]
        before[use.first].append(Op(_AROUND[first.kind][1], first.index, first.stage))
    return tuple(each for k, op in enumerate(ops) for each in _around(op, before.get(k, ()), after.get(k)))


def _around(op: Op, before: Collection[Op], after: Op | None) -> Iterator[Op]:
    yield from before
    yield op
    if after is not None:
        yield after


def gathers(ops: Ops) -> dict[int, int]:
    """How often a rank's list gathers the parameters of each stage."""
    found: dict[int, int] = {}
    for op in ops:
        if op.kind in (Kinds.COLLECT_FORWARD, Kinds.COLLECT_BACKWARD):
            found[op.stage] = found.get(op.stage, 0) + 1
    return found
