"""Schedules whose stages go around the ranks: gpipe, 1f1b, interleaved and gis."""

from __future__ import annotations

from ..program import Op, Ops
from .base import Orders, Shape, backward, evenly, first, forward, input_grad, weight_grad


def gpipe(shape: Shape) -> Orders:
    """All forward passes, then all backward passes (Huang et al., 2019)."""
    mbs = range(shape.microbatches)
    return tuple(
        tuple([forward(i, r) for i in mbs] + [backward(i, r) for i in mbs])  #
        for r in range(shape.ranks)
    )


def one_forward_one_backward(shape: Shape) -> Orders:
    """As many forward passes as there are ranks behind, then forward and backward in turn (Narayanan et al., 2021)."""
    p, m = shape.ranks, shape.microbatches
    return tuple(
        _in_turn(
            [forward(i, r) for i in range(m)],
            [(backward(i, r),) for i in range(m)],
            warm=p - 1 - r + shape.delay,
        )
        for r in range(p)
    )


def interleaved(shape: Shape) -> Orders:
    """1f1b with several chunks per rank, in Megatron's order (Narayanan et al., 2021); with one chunk, 1f1b.

    Chunks take turns of `group` microbatches. A turn shorter than the ranks would wait for itself: where the last one
    would be that short, the order is made for full turns and the missing microbatches are left out of all of them.
    """
    p, v, g = shape.ranks, shape.chunks, shape.group
    if v == 1:
        return one_forward_one_backward(shape)
    whole = shape.microbatches
    if whole % g and whole % g < p:
        whole = -(-whole // g) * g
    orders = []
    for r in range(p):
        forwards = [forward(i, c * p + r) for i, c in _turns(whole, v, g)]
        backwards = [(backward(i, (v - 1 - c) * p + r),) for i, c in _turns(whole, v, g)]
        orders.append(_in_turn(forwards, backwards, warm=2 * (p - 1 - r) + (v - 1) * g + shape.delay))
    if shape.microbatches < g:
        return first(tuple(orders), shape.microbatches)
    return evenly(tuple(orders), whole, shape.microbatches)


def grouped_split(shape: Shape) -> Orders:
    """interleaved with split backward and half the warm-up: GIS (Wan et al., PipeOffload, 2025).

    The weight gradient follows its input gradient at once, so the rank before need not wait for it: p - 1 - r more
    forward passes than the turns need are enough. A `group` below the ranks keeps fewer activations and waits more.
    """
    p, v, g = shape.ranks, shape.chunks, shape.group
    whole = -(-shape.microbatches // g) * g
    orders = []
    for r in range(p):
        forwards = [forward(i, c * p + r) for i, c in _turns(whole, v, g)]
        stages = [(i, (v - 1 - c) * p + r) for i, c in _turns(whole, v, g)]
        backwards = [(input_grad(i, s), weight_grad(i, s)) for i, s in stages]
        orders.append(_in_turn(forwards, backwards, warm=(v - 1) * g + p - 1 - r + shape.delay))
    return first(tuple(orders), shape.microbatches)


def _turns(microbatches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) of each forward pass: every chunk takes a group of microbatches, then the next group."""
    return [
        (i, c)
        for start in range(0, microbatches, group)
        for c in range(chunks)
        for i in range(start, min(start + group, microbatches))
    ]


def _in_turn(forwards: list[Op], backwards: list[Ops], warm: int) -> Ops:
    """`warm` forward passes, then forward and backward in turn, then the backward passes that are left."""
    ops = forwards[:warm]
    for k, back in enumerate(backwards):
        ops += [*forwards[warm + k : warm + k + 1], *back]
    return tuple(ops)
