"""A pipeline schedule of one's own: 1f1b over pairs of microbatches.

Each rank runs two forward passes, then two backward passes. While one microbatch of a pair is on its way to the next
rank, the other one is computed: what transfers take is hidden, for twice the activations of 1f1b.
"""

from pentad.parallel.pipeline.program import Op
from pentad.parallel.pipeline.schedules import Orders, Schedule, Shape, register
from pentad.parallel.pipeline.schedules.base import backward, forward


@register(Schedule(name="pairs", text="1f1b over pairs of microbatches"))
def pairs(shape: Shape) -> Orders:
    """The compute of each rank, in order. Sends, receives and the end of the step are added to it."""
    taken = [range(i, min(i + 2, shape.microbatches)) for i in range(0, shape.microbatches, 2)]
    return tuple(_of_rank(taken, rank, shape.ranks) for rank in range(shape.ranks))


def _of_rank(taken: list[range], rank: int, ranks: int) -> tuple[Op, ...]:
    ahead = min(ranks - rank, len(taken))  # pairs in flight: the first rank waits longest for its gradients
    ops = [forward(i, rank) for pair in taken[:ahead] for i in pair]
    for n, pair in enumerate(taken):
        ops += [backward(i, rank) for i in pair]
        if n + ahead < len(taken):
            ops += [forward(i, rank) for i in taken[n + ahead]]
    return tuple(ops)
