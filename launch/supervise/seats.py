"""Who takes which slot in a mesh of another layout. Pure, no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ...trainer.recovery.resplit import Seating, reseated
from ...trainer.recovery.ways import Way


def seated(
    before: Way, after: Way, members: Sequence[int], gone: Collection[int], ready: Sequence[int]
) -> tuple[int, ...]:
    """The number of the process in each slot of the next mesh.

    Where they differ in the stages alone, each pipeline goes on with its own processes (`trainer.recovery.resplit`).
    Where they differ in data parallelism alone, whole replicas go on as they are, and whoever is left of a
    broken one goes where its own part of the model is missing: then state moves as little as can be. The process in the
    first slot stays there, for the run's files are open in it.

    Args:
        before, after: the layouts; slots stand stage by stage, in a stage replica by replica.
        members: the number in each slot of the mesh before.
        gone: slots of it whose processes are lost.
        ready: numbers of processes in no slot.

    Raises:
        ValueError: there are too few.
    """
    split = resplit_seating(before, after, members, gone, ready)
    if split is not None:
        return tuple(number for number in split.seats if number is not None)
    left = {slot: number for slot, number in enumerate(members) if slot not in gone}
    seats = _kept(before, after, left) if (before.stages, before.block) == (after.stages, after.block) else {}
    seats = seats or dict(enumerate(list(left.values())[: after.members]))
    rest = [number for number in (*left.values(), *ready) if number not in seats.values()]
    if len(seats) + len(rest) < after.members:
        raise ValueError(f"{after.members} slots, and {len(seats) + len(rest)} processes")
    for slot in range(after.members):
        if slot not in seats:
            seats[slot] = rest.pop(0)
    first = left.get(0)
    if first is not None and seats[0] != first:
        where = next((slot for slot, number in seats.items() if number == first), None)
        seats |= {0: first} if where is None else {0: first, where: seats[0]}
    return tuple(seats[slot] for slot in range(after.members))


def resplit_seating(
    before: Way, after: Way, members: Sequence[int], gone: Collection[int], ready: Sequence[int]
) -> Seating | None:
    """The seats where the layouts differ in the stages alone, and how much moves; None: they do not. Arguments as of
    `seated`.

    Raises:
        ValueError: there are too few.
    """
    one, two = before.holdings, after.holdings
    if one is None or two is None or one.units == two.units:
        return None
    if (before.replicas, before.block) != (after.replicas, after.block):
        return None
    return reseated(one, two, members, gone, ready)


def _kept(before: Way, after: Way, left: dict[int, int]) -> dict[int, int]:
    """Those of the replicas that stay, the whole ones first, in the slots of the same part of the model; then others
    that have that part."""
    parts = [(stage, at) for stage in range(before.stages) for at in range(before.block)]

    def slot(way: Way, stage: int, replica: int, at: int) -> int:
        return (stage * way.replicas + replica) * way.block + at

    def holes(replica: int) -> int:
        return sum(slot(before, stage, replica, at) not in left for stage, at in parts)

    stay = sorted(sorted(range(before.replicas), key=holes)[: after.replicas])
    seats: dict[int, int] = {}
    for stage, at in parts:
        others = [
            number
            for replica in range(before.replicas)
            if replica not in stay and (number := left.get(slot(before, stage, replica, at))) is not None
        ]
        for to in range(after.replicas):
            number = left.get(slot(before, stage, stay[to], at)) if to < len(stay) else None
            number = number if number is not None else others.pop(0) if others else None
            if number is not None:
                seats[slot(after, stage, to, at)] = number
    return seats
