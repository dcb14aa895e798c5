"""Refinement as a pass: a rank's stage becomes consecutive stages of the same rank, its part-stages.

    F3@0 SF3@0 … RB3@0#0 B3@0 W3@0                             one stage of four layers
    F3@0 F3@1 SF3@1 … RB3@1#0 B3@1 B3@0 W3@1 W3@0              two part-stages of two layers each

A refined program is a program with more stages, nothing else: the check, the simulator, offload and the executor know
no part-stages. What one hands to the next stays on the rank, as at the turn of a vee.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from .communication import is_training, number_slots
from .kind import Acts
from .program import Op, Ops, Program


def part_stages(parts: Sequence[int]) -> tuple[range, ...]:
    """The part-stages of each stage, given into how many it is refined."""
    ends = tuple(accumulate(parts))
    return tuple(range(end - count, end) for end, count in zip(ends, parts, strict=True))


def refine(program: Program, parts: Sequence[int]) -> Program:
    """The program with so many part-stages instead of each stage.

    Args:
        program: of a training step or an evaluation, of compute only or lowered, also with offloads.
        parts: of each stage, at least 1.

    Raises:
        ValueError: not one number for each stage, or one below 1.
    """
    if len(parts) != program.stages or min(parts) < 1:
        raise ValueError(f"{list(parts)} are not the numbers of part-stages of {program.stages} stages")
    if max(parts) == 1:
        return program
    stages, training = part_stages(parts), is_training(program)
    placement = tuple(rank for rank, mine in zip(program.placement, stages, strict=True) for _ in mine)
    refined = (tuple(part for op in ops for part in _parts(op, stages)) for ops in program.ranks)
    return replace(program, placement=placement, ranks=tuple(number_slots(ops, training) for ops in refined))


def _parts(op: Op, stages: tuple[range, ...]) -> Ops:
    """What stands for an operation, in order."""
    if op.kind.acts is not Acts.STAGE:
        return (op,)
    mine = stages[op.stage]
    if op.kind.transfers:
        # What comes from or goes to the next stage belongs to the last part-stage, the rest to the first.
        return (Op(op.kind, op.index, mine[-1] if op.kind.toward > 0 else mine[0]),)
    return tuple(Op(op.kind, op.index, stage) for stage in (reversed(mine) if op.kind.trains else mine))
