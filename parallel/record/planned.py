"""How much of a pipeline's waiting its program foresees: the program is simulated with the step's own durations."""

from __future__ import annotations

import numpy as np

from ..pipeline.needs import KINDS
from ..pipeline.program import Op, Program
from ..pipeline.simulate import simulate
from ..pipeline.times import Times
from .parts import DURATIONS
from .waterfall import durations_of


def measured_times(program: Program, rows: np.ndarray) -> Times:
    """How long the program's computing operations took, on the mean over the replicas of each rank of the pipeline.

    Args:
        program: of the pipeline.
        rows: (ranks, numbers) of the whole job; the pipeline is the slowest axis.
    """
    ranks = len(program.ranks)
    means = rows.reshape(ranks, len(rows) // ranks, -1).mean(1)
    spans = []
    for rank, ops in enumerate(program.ranks):
        for place, (token, stage) in enumerate(durations_of(ops)):
            spans.append((rank, Op(KINDS[token], 0, stage), 0.0, float(means[rank, DURATIONS + place])))
    return Times.from_spans(spans, program.placement)


def planned_idle(program: Program, times: Times) -> np.ndarray:
    """(ranks of the pipeline,) what each rank does not compute between the first operation of any rank and the end of
    the last one, where only the program's order makes it wait; in the unit of `times`."""
    makespan = simulate(program, times).makespan
    busy = [sum(times.of(op, rank) for op in ops if op.kind.computes) for rank, ops in enumerate(program.ranks)]
    return makespan - np.array(busy)
