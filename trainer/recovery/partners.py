"""Which rank keeps a copy of which other one's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...parallel.comm.mesh import Degrees


def partners(nodes: Sequence[str], degrees: Degrees) -> tuple[int | None, ...]:
    """For each slot the slot that keeps its copies: on another node, and where that can be outside its tensor parallel
    group and its pipeline, which are often lost together. No slot keeps those of two others.

    Args:
        nodes: where each slot is.
        degrees: of the mesh, whose slots count along tp first, then cp, dp and pp.

    Returns:
        None where there is no other node, or not enough slots on others.
    """
    world, stage = len(nodes), degrees.world // degrees.pp

    def apart(slot: int, other: int) -> bool:
        return slot // degrees.tp != other // degrees.tp and slot % stage != other % stage

    def elsewhere(slot: int, other: int) -> bool:
        return nodes[slot] != nodes[other]

    # Gaps on a ring keep neighbours' traffic alike; the nearest one that suits all slots is taken.
    for suits in (lambda a, b: elsewhere(a, b) and apart(a, b), elsewhere):
        for gap in range(1, world):
            if all(suits(slot, (slot + gap) % world) for slot in range(world)):
                return tuple((slot + gap) % world for slot in range(world))
    return _matched(world, elsewhere)


def _matched(world: int, suits: Callable[[int, int], bool]) -> tuple[int | None, ...]:
    """As many slots as possible with one each (augmenting paths)."""
    keeper_of: list[int | None] = [None] * world
    kept_by: list[int | None] = [None] * world

    def place(slot: int, tried: set[int]) -> bool:
        for other in range(world):
            if other in tried or not suits(slot, other):
                continue
            tried.add(other)
            held = kept_by[other]
            if held is None or place(held, tried):
                kept_by[other], keeper_of[slot] = slot, other
                return True
        return False

    for slot in range(world):
        place(slot, set())
    return tuple(keeper_of)
