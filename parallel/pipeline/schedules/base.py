"""What every schedule has in common: what its order depends on, and the small words that it is written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..needs import Kinds
from ..program import Op, Ops

Orders = tuple[Ops, ...]
"""The compute operations of each rank, in order."""


@dataclass(frozen=True)
class Shape:
    """The size of a pipeline: what the order of a schedule depends on.

    Args:
        ranks: of the pipeline axis, p.
        microbatches: per step, m.
        chunks: stages per rank, v.
        group: microbatches that a chunk takes in turn before the next chunk (interleaved and gis), g.
        delay: for schedules that can be balanced: each backward pass goes behind so many more forward passes, which
            leaves time for the head on all ranks. v-half: so many more of each stage.
    """

    ranks: int
    microbatches: int
    chunks: int
    group: int
    delay: int = 0


Order = Callable[[Shape], Orders]
"""What makes the order of a schedule."""


def forward(microbatch: int, stage: int) -> Op:
    return Op(Kinds.FORWARD, microbatch, stage)


def backward(microbatch: int, stage: int) -> Op:
    return Op(Kinds.BACKWARD, microbatch, stage)


def input_grad(microbatch: int, stage: int) -> Op:
    return Op(Kinds.INPUT_GRAD, microbatch, stage)


def weight_grad(microbatch: int, stage: int) -> Op:
    return Op(Kinds.WEIGHT_GRAD, microbatch, stage)


def first(orders: Orders, microbatches: int) -> Orders:
    """The order of the first `microbatches` alone.

    Microbatches wait for each other only through the order of a rank, so what could run still can.
    """
    return tuple(tuple(op for op in ops if op.index < microbatches) for ops in orders)


def evenly(orders: Orders, given: int, microbatches: int) -> Orders:
    """The order of `microbatches` out of the `given` ones, taken at even distances and numbered anew."""
    index = {i * given // microbatches: i for i in range(microbatches)}
    return tuple(tuple(replace(op, index=index[op.index]) for op in ops if op.index in index) for ops in orders)
