"""Zero Bubble with one stage per rank (Qi et al., 2023): weight gradients fill what would be bubble."""

from __future__ import annotations

from ..program import Op, Ops
from .base import Orders, Shape, forward, input_grad, weight_grad


def h1(shape: Shape) -> Orders:
    """The memory of 1f1b: a rank holds back as many weight gradients as there are ranks before it."""
    p, m = shape.ranks, shape.microbatches
    return tuple(_delayed(r, m, warm=p - 1 - r, delay=r) for r in range(p))


def h2(shape: Shape) -> Orders:
    """Twice the warm-up and twice the delay: no bubble inside a rank's span, with nearly twice the memory.

    Ranks start and finish staggered, so the gain lasts only while the optimizer step does not wait for all ranks.
    """
    p, m = shape.ranks, shape.microbatches
    return tuple(_delayed(r, m, warm=2 * (p - 1 - r), delay=2 * r) for r in range(p))


def _delayed(rank: int, microbatches: int, warm: int, delay: int) -> Ops:
    """1f1b with `warm` forward passes first, and each weight gradient `delay` microbatches late."""
    ops: list[Op] = [forward(i, rank) for i in range(min(warm, microbatches))]
    for i in range(microbatches):
        if warm + i < microbatches:
            ops.append(forward(warm + i, rank))
        ops.append(input_grad(i, rank))
        if i >= delay:
            ops.append(weight_grad(i - delay, rank))
    ops += [weight_grad(i, rank) for i in range(max(0, microbatches - delay), microbatches)]
    return tuple(ops)
