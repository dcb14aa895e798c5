"""Who needs whom: what a program's operations wait for, and the communication that stands between them.

Everything here is read off the rows of `needs.py`. A key is (kind, index, stage): an operation without its slot, which
is unique on a rank. Where a backward pass may be fused or split, its key says B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from .kind import Acts, Kind, Need, Place, Role
from .needs import KINDS, flows, stands_for
from .program import Op, Ops, Program

Key = tuple[Kind, int, int]
Row = tuple[Kind, int]
"""A kind at a stage: an operation of any microbatch."""


def key(op: Op) -> Key:
    """The operation without its slot, a fused backward as B."""
    return (stands_for(op.kind) if op.kind.fuses else op.kind, op.index, op.stage)


def places(ops: Ops, first: int = 0) -> dict[Key, int]:
    """Where in a list each operation stands, counted from `first`."""
    return {
        (stands_for(op.kind) if op.kind.fuses else op.kind, op.index, op.stage): at for at, op in enumerate(ops, first)
    }


class Relation(dict[Row, tuple[Row, ...]]):
    """What `find` gives for an operation, without the microbatch: who needs whom differs by its number alone, so it is
    found once for all of them."""

    def __init__(self, find: Callable[[Op], Iterable[Key | None]]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, row: Row) -> tuple[Row, ...]:
        kind, stage = row
        found = tuple((need[0], need[2]) for need in self._find(Op(kind, 0, stage)) if need is not None)
        self[row] = found
        return found


def is_training(program: Program) -> bool:
    """Whether any operation belongs to a backward pass; a program without one is an evaluation."""
    return any(op.kind.computes and op.kind.trains for ops in program.ranks for op in ops)


def is_lowered(program: Program) -> bool:
    """Whether any operation communicates; a program without one is compute-only, or has one rank."""
    return any(op.kind.communicates for ops in program.ranks for op in ops)


def lanes() -> tuple[str, ...]:
    """The lanes of collectives. Each runs its collectives one after the other, in program order."""
    return tuple(dict.fromkeys(kind.lane for kind in KINDS.values() if kind.lane))


def channel(op: Op, rank: int, program: Program) -> tuple[int, int]:
    """(source rank, destination rank) of a send or receive in the list of a rank.

    Raises:
        ValueError: the operation is neither, or the stage has no neighbour on that side.
    """
    kind = op.kind
    if not (kind.transfers and 0 <= op.stage + kind.toward < program.stages):
        raise ValueError(f"{op} uses no channel")
    other = program.placement[op.stage + kind.toward]
    return (rank, other) if kind.role is Role.SEND else (other, rank)


def counterpart(op: Op) -> Op:
    """The receive (without slot) of a send, or the send of a receive.

    Raises:
        ValueError: the operation is neither.
    """
    if not op.kind.transfers:
        raise ValueError(f"{op} is neither sent nor received")
    return Op(KINDS[op.kind.pair], op.index, op.stage + op.kind.toward)


def applies(need: Need, program: Program, stage: int) -> bool:
    """Whether a need holds for an operation at a stage (-1: of a rank)."""
    last = program.stages - 1
    if program.vocab_barriers not in need.barriers:
        return False
    if need.only is not None and stage != (0 if need.only is Place.FIRST else last):
        return False
    return not ((need.place is Place.PREVIOUS and stage <= 0) or (need.place is Place.NEXT and stage >= last))


def stage_of(place: Place, program: Program, stage: int) -> int:
    """The stage at which a needed operation stands, seen from one at `stage`; -1 where it is of every rank."""
    match place:
        case Place.PREVIOUS:
            return stage - 1
        case Place.NEXT:
            return stage + 1
        case Place.FIRST:
            return 0
        case Place.LAST:
            return program.stages - 1
        case Place.EVERYWHERE:
            return -1
        case Place.SAME:
            return stage


def data_needs(program: Program, op: Op) -> tuple[tuple[int, Op], ...]:
    """What must be finished before a compute operation can start: (rank, compute operation), on whatever rank.

    A need for a backward pass is stated as B; a program that does not split backward answers it with BW.
    """
    found: list[tuple[int, Op]] = []
    for need in op.kind.needs:
        if applies(need, program, op.stage):
            stage = stage_of(need.place, program, op.stage)
            ranks = (program.placement[stage],) if stage >= 0 else range(len(program.ranks))
            found += [(rank, Op(KINDS[need.kind], op.index, stage)) for rank in ranks]
    return tuple(found)


def producer(program: Program, op: Op, rank: int) -> Key | None:
    """The compute operation in the rank's own list that a send or collective must come after; None where none is."""
    if op.kind.role not in (Role.SEND, Role.COLLECTIVE):
        return None
    flow = flows(op.kind.token)[0]
    if op.kind.role is Role.SEND:
        return (flow.source, op.index, op.stage)
    if flow.source.acts is Acts.RANK:
        return (flow.source, op.index, -1)
    stage = stage_of(flow.need.place, program, -1)
    return (flow.source, op.index, stage) if program.placement[stage] == rank else None


def predecessors(program: Program, op: Op, rank: int) -> tuple[Key, ...]:
    """What an operation must come after in its rank's own list, where another rank's part in it does not imply it."""
    if op.kind.local:
        return tuple(key(need) for where, need in data_needs(program, op) if where == rank)
    made = producer(program, op, rank)
    return () if made is None else (made,)


def consumers(program: Program, op: Op, rank: int, training: bool = True) -> tuple[Key, ...]:
    """The compute operations in the rank's own list that wait for a receive or collective."""
    kind = op.kind
    if kind.role is Role.RECEIVE:
        return tuple((flow.target, op.index, op.stage) for flow in flows(kind.pair))
    found: list[Key] = []
    for flow in flows(kind.token) if kind.role is Role.COLLECTIVE else ():
        if program.vocab_barriers not in flow.need.barriers or (flow.target.trains and not training):
            continue
        if flow.target.acts is Acts.RANK:
            found.append((flow.target, op.index, -1))
        elif flow.need.only is not None:
            stage = stage_of(flow.need.only, program, -1)
            if program.placement[stage] == rank:
                found.append((flow.target, op.index, stage))
    return tuple(found)


def awaited(program: Program, op: Op) -> Key | None:
    """The send or collective of other ranks that a compute operation waits for; None where its own list suffices."""
    for need in op.kind.needs:
        if not need.by or not applies(need, program, op.stage):
            continue
        if KINDS[need.by].role is Role.COLLECTIVE:
            return (KINDS[need.by], op.index, -1)
        stage = stage_of(need.place, program, op.stage)
        return (KINDS[need.by], op.index, stage) if program.placement[stage] != program.placement[op.stage] else None
    return None


def expected_communication(program: Program, rank: int, training: bool) -> tuple[Row, ...]:
    """The communication that the compute of a rank needs of each microbatch, in no particular order."""
    if len(program.ranks) == 1:
        return ()
    where, stages = program.placement, program.stages_of(rank)
    carriers = [kind for kind in KINDS.values() if kind.communicates and (training or not kind.trains)]
    transfers = [
        (kind, s)
        for s in stages
        for kind in carriers
        if kind.transfers and 0 <= (other := s + kind.toward) < program.stages and where[other] != rank
    ]
    collectives = [
        (kind, -1)
        for kind in carriers
        if kind.lane and any(program.vocab_barriers in flow.need.barriers for flow in flows(kind.token))
    ]
    return (*transfers, *collectives)


def releases(op: Op, training: bool) -> tuple[Key, ...]:
    """What has a slot that is free once an operation is done: receives, and copies to the host."""
    return tuple((kind, op.index, op.stage) for kind in _released_by(op.kind, training))


@cache
def _released_by(kind: Kind, training: bool) -> tuple[Kind, ...]:
    done = {kind.token, *kind.fuses}
    return tuple(each for each in KINDS.values() if done.intersection(each.slot_until[not training]))


class SlotCounter:
    """The slots in use on one rank while its list is walked in order."""

    def __init__(self, training: bool) -> None:
        self._training = training
        self._held: dict[Key, int] = {}
        self._used: dict[tuple[int, str], dict[int, Key]] = {}

    def step(self, op: Op) -> None:
        """Frees what a compute operation releases."""
        for kind in _released_by(op.kind, self._training):
            receive = (kind, op.index, op.stage)
            slot = self._held.pop(receive, None)
            if slot is not None:
                used = self._used[_pool(receive[0], receive[2])]
                if used.get(slot) == receive:
                    del used[slot]

    def smallest(self, op: Op) -> int:
        """The smallest slot that is free for a receive."""
        used = self._used.get(_pool(op.kind, op.stage), ())
        slot = 0
        while slot in used:
            slot += 1
        return slot

    def holder(self, op: Op) -> Key | None:
        """The receive that has the slot that a receive names."""
        return self._used.get(_pool(op.kind, op.stage), {}).get(op.slot)

    def take(self, op: Op) -> None:
        """Notes that a receive has the slot that it names."""
        self._held[key(op)] = op.slot
        self._used.setdefault(_pool(op.kind, op.stage), {})[op.slot] = key(op)


def _pool(kind: Kind, stage: int) -> tuple[int, str]:
    return (-1, kind.pool) if kind.pool else (stage, kind.token)


def number_slots(ops: Ops, training: bool) -> Ops:
    """A rank's list with the smallest slot that is free at its place for all that needs one."""
    counter = SlotCounter(training)
    result = []
    for op in ops:
        counter.step(op)
        if op.kind.slot_until[0]:
            op = Op(op.kind, op.index, op.stage, counter.smallest(op))
            counter.take(op)
        result.append(op)
    return tuple(result)


def slots(program: Program) -> dict[tuple[int, int, Kind], int]:
    """How many buffers a lowered program's receives need: per (rank, stage, RF or RB)."""
    count: dict[tuple[int, int, Kind], int] = {}
    for rank, ops in enumerate(program.ranks):
        for op in ops:
            if op.kind.role is Role.RECEIVE:
                where = (rank, op.stage, op.kind)
                count[where] = max(count.get(where, 0), op.slot + 1)
    return count
