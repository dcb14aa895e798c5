"""DualPipeV (DeepSeek, 2025): a V whose steady state pairs a forward with a backward pass of another microbatch."""

from __future__ import annotations

from collections import deque

from ..program import Op, Ops
from .base import Orders, Shape, backward, first, forward, input_grad, weight_grad


def dualpipev(shape: Shape) -> Orders:
    """The order of DualPipeV, each pair as its forward and then its backward pass.

    Of the two, only the sends run under the other's compute; the pairs are what communication inside a stage (experts)
    can be overlapped over. The order needs 2p microbatches; of fewer, it is the part that concerns them.
    """
    p = shape.ranks
    whole = max(shape.microbatches, 2 * p)
    return first(tuple(_Rank(p, r).order(whole) for r in range(p)), shape.microbatches)


class _Rank:
    """Writes one rank's order. Phase 0 is the stage on the way down, phase 1 the one on the way up."""

    def __init__(self, ranks: int, rank: int) -> None:
        self.behind, self.upto = ranks - rank - 1, rank + 1
        self.stages = (rank, 2 * ranks - 1 - rank)
        self.ops: list[Op] = []
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.pending: deque[Op] = deque()

    def order(self, microbatches: int) -> Ops:
        """All operations, for at least 2p microbatches."""
        for _ in range(2 * self.behind):
            self.forward(0)
        for _ in range(self.upto):
            self.forward(0)
            self.forward(1)
        for _ in range(self.behind):
            self.backward(1, split=True)
            self.weight()
            self.forward(1)
        for _ in range(microbatches - 2 * self.behind - self.upto):
            self.forward(0)
            self.backward(1)
            self.forward(1)
            self.backward(0)
        for _ in range(self.behind):
            self.backward(1)
            self.forward(1)
            self.backward(0)
        # The last upto backward passes leave their weight gradients for the wait for the ranks before.
        for k in range(2 * self.upto):
            self.backward(1 - k % 2, split=k >= self.upto)
        for _ in range(self.behind):
            self.weight()
            self.backward(0, split=True)
        self.ops += self.pending
        return tuple(self.ops)

    def forward(self, phase: int) -> None:
        self.ops.append(forward(self.forwards[phase], self.stages[phase]))
        self.forwards[phase] += 1

    def backward(self, phase: int, split: bool = False) -> None:
        i, stage = self.backwards[phase], self.stages[phase]
        self.backwards[phase] += 1
        self.ops.append(input_grad(i, stage) if split else backward(i, stage))
        if split:
            self.pending.append(weight_grad(i, stage))

    def weight(self) -> None:
        self.ops.append(self.pending.popleft())
