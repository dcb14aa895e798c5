"""Schedules in a V: a rank holds stage r on the way down and stage 2p - 1 - r on the way up.

zb-v is the hand-made order of Zero Bubble (Qi et al., 2023); v-half and v-min repeat one building block per microbatch
(Qi et al., Pipeline Parallelism with Controllable Memory, 2024).
"""

from __future__ import annotations

from collections import Counter, deque

from ..kind import Kind
from ..needs import Kinds
from ..program import Op, Ops
from .base import Orders, Shape, first, forward, input_grad, weight_grad

Offsets = tuple[int, int, int, int]
"""Slots in which a rank runs F(r), F(2p - 1 - r), B(2p - 1 - r) and B(r) of microbatch 0."""

INTERVAL = 6
"""Slots from one microbatch to the next: F, B and W of two stages."""


class _Counted:
    """Writes a rank's order; each kind and stage takes its microbatches in order."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.done: Counter[tuple[Kind, int]] = Counter()

    def add(self, stage: int, *kinds: Kind, times: int = 1) -> None:
        """Appends these kinds in turn, each with its next microbatch."""
        for _ in range(times):
            for kind in kinds:
                self.ops.append(Op(kind, self.done[kind, stage], stage))
                self.done[kind, stage] += 1


def zb_v(shape: Shape) -> Orders:
    """No bubble inside a rank's span where F, B and W take equal time, with the memory of 1f1b on every rank.

    The order needs 2p - 1 microbatches; of fewer, it is the part that concerns them.
    """
    p = shape.ranks
    whole = max(shape.microbatches, 2 * p - 1)
    return first(tuple(_zb_v(p, r, whole) for r in range(p)), shape.microbatches)


def _zb_v(p: int, r: int, m: int) -> Ops:
    down, up = r, 2 * p - 1 - r
    f, b, w = Kinds.FORWARD, Kinds.INPUT_GRAD, Kinds.WEIGHT_GRAD
    rank = _Counted()
    rank.add(down, f, times=2 * (p - r) - 1)
    for _ in range(r):
        rank.add(up, f)
        rank.add(down, f)
    rank.add(up, f, b, w, times=p - r)
    while rank.done[f, up] < m:
        if rank.done[f, down] < m:
            rank.add(down, f)
        rank.add(down, b, w)
        rank.add(up, f, b, w)
    for _ in range(r):
        rank.add(down, b)
        rank.add(up, b)
    rank.add(down, b, w, times=p - r)
    rank.add(up, w, times=m - rank.done[w, up])
    rank.add(down, w, times=m - rank.done[w, down])
    return tuple(rank.ops)


def v_half(shape: Shape) -> Orders:
    """Half the memory of 1f1b on every rank: two slots per stage on the way down, one on the way up.

    No two passes of a rank fall on the same slot for any p: they differ modulo 3, except F(2p - 1 - r) and B(r), which
    are 3p + shift apart, an odd number of threes.
    """
    p = shape.ranks
    shift = (0 if p % 2 else 3) + INTERVAL * shape.delay
    blocks = [(2 * r, 3 * p - r - 2, 3 * p + shift + 2 * r - 1, 6 * p + shift - r - 2) for r in range(p)]
    return _repeated(shape, blocks)


def v_min(shape: Shape) -> Orders:
    """A third of the memory of 1f1b on every rank: one slot per stage. The bubble grows with m if times are unequal.

    No two passes of a rank fall on the same slot for any p: they differ modulo 2, except F of one stage and B of the
    other, which are 2p + shift apart, no multiple of 6.
    """
    p = shape.ranks
    shift = 0 if p % 3 else 2
    blocks = [(r, 2 * p - r - 1, 2 * p + shift + r, 4 * p + shift - r - 1) for r in range(p)]
    return _repeated(shape, blocks)


def _repeated(shape: Shape, blocks: list[Offsets]) -> Orders:
    return tuple(_by_slot(shape.ranks, shape.microbatches, r, offsets) for r, offsets in enumerate(blocks))


def _by_slot(p: int, m: int, r: int, offsets: Offsets) -> Ops:
    """A rank's passes in the order of their slots; each free slot takes the oldest weight gradient that is possible."""
    down, up = r, 2 * p - 1 - r
    kinds = ((forward, down), (forward, up), (input_grad, up), (input_grad, down))
    slots: dict[int, Op] = {}
    for (make, stage), offset in zip(kinds, offsets, strict=True):
        slots |= {offset + INTERVAL * i: make(i, stage) for i in range(m)}
    ops: list[Op] = []
    pending: deque[Op] = deque()
    for slot in range(max(slots) + 1):
        if op := slots.get(slot):
            ops.append(op)
            if op.kind is Kinds.INPUT_GRAD:
                pending.append(weight_grad(op.index, op.stage))
        elif pending:
            ops.append(pending.popleft())
    return (*ops, *pending)
