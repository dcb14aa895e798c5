"""Uniformly repeated interleaving, for programs that offload activations: PO (Wan et al., PipeOffload, 2025).

gis with half groups is bursty: a rank's activations come in quick succession and leave so too, and copies would have to
be as fast as both bursts. Here every chunk has its fixed place in an interval of 3v passes, repeated for each
microbatch: activations come and go evenly, and the time between, in which an activation is elsewhere, is longest for
the first chunk. A program of it is not squeezed: a pass that could start earlier would only be kept longer.
"""

from __future__ import annotations

from math import gcd

from ..program import Op
from .base import Orders, Shape, forward, input_grad, weight_grad


def uniform(shape: Shape) -> Orders:
    """Each rank's passes by the slot in which they stand; no two share one.

    A chunk follows the one before it after 3·⌈p/2⌉ slots, and after 3 more wherever that would meet the next interval's
    passes (the intervals are 3v long). The backward pass of the last chunk goes up through the ranks in steps of three.
    """
    p, v, m = shape.ranks, shape.chunks, shape.microbatches
    half = -(-p // 2)
    wraps = v // gcd(v, half)
    starts = [3 * half * c + 3 * (c // wraps) for c in range(v)]
    return tuple(_rank(p, v, m, r, starts) for r in range(p))


def _rank(p: int, v: int, m: int, r: int, starts: list[int]) -> tuple[Op, ...]:
    first_back = starts[v - 1] + r + 3 * (p - 1 - r) + 1
    slots: dict[int, Op] = {}
    for i in range(m):
        for c in range(v):
            slots[3 * v * i + starts[c] + r] = forward(i, c * p + r)
            back = 3 * v * i + first_back + starts[c]
            slots[back] = input_grad(i, (v - 1 - c) * p + r)
            slots[back + 1] = weight_grad(i, (v - 1 - c) * p + r)
    return tuple(slots[slot] for slot in sorted(slots))
