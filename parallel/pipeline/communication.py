"""Who talks to whom: what communication a program needs, and which operations it stands between.

A key is (kind, index, stage): an operation without its slot, which is unique on a rank. Where a backward pass may be
fused or split, its key says B.
"""

from __future__ import annotations

from collections.abc import Iterator

from .program import COLLECTIVES, EMBED_LANE, HEAD_LANE, RECEIVES, SENDS, Kind, Op, Ops, Program

COMMUNICATION = SENDS | RECEIVES | COLLECTIVES
TRAINING = frozenset({Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD, Kind.HEAD_GRAD, Kind.EMBED_GRAD})
"""A program without any of these is an evaluation."""
LANES = {"head": HEAD_LANE, "embed": EMBED_LANE}

Key = tuple[Kind, int, int]


def key(op: Op) -> Key:
    """The operation without its slot, a fused backward as B."""
    return (Kind.INPUT_GRAD if op.kind is Kind.BACKWARD else op.kind, op.index, op.stage)


def is_training(program: Program) -> bool:
    """Whether any operation belongs to a backward pass; a program without one is an evaluation."""
    return any(op.kind in TRAINING for ops in program.ranks for op in ops)


def is_lowered(program: Program) -> bool:
    """Whether any operation communicates; a program without one is compute-only, or has one rank."""
    return any(op.kind in COMMUNICATION for ops in program.ranks for op in ops)


def channel(op: Op, rank: int, program: Program) -> tuple[int, int]:
    """(source rank, destination rank) of a send or receive in the list of a rank.

    Raises:
        ValueError: the operation is neither, or the stage has no neighbour on that side.
    """
    step = {Kind.SEND_FORWARD: 1, Kind.RECV_BACKWARD: 1, Kind.SEND_BACKWARD: -1, Kind.RECV_FORWARD: -1}.get(op.kind)
    if step is None or not 0 <= op.stage + step < program.stages:
        raise ValueError(f"{op} uses no channel")
    other = program.placement[op.stage + step]
    return (rank, other) if op.kind in SENDS else (other, rank)


def counterpart(op: Op) -> Op:
    """The receive (without slot) of a send, or the send of a receive.

    Raises:
        ValueError: the operation is neither.
    """
    match op.kind:
        case Kind.SEND_FORWARD:
            return Op(Kind.RECV_FORWARD, op.index, op.stage + 1)
        case Kind.RECV_FORWARD:
            return Op(Kind.SEND_FORWARD, op.index, op.stage - 1)
        case Kind.SEND_BACKWARD:
            return Op(Kind.RECV_BACKWARD, op.index, op.stage - 1)
        case Kind.RECV_BACKWARD:
            return Op(Kind.SEND_BACKWARD, op.index, op.stage + 1)
    raise ValueError(f"{op} is neither sent nor received")


def producer(program: Program, op: Op, rank: int) -> Key | None:
    """The compute operation in the rank's own list that a send or collective must come after; None where none is."""
    i, last = op.index, program.stages - 1
    match op.kind:
        case Kind.SEND_FORWARD:
            return (Kind.FORWARD, i, op.stage)
        case Kind.SEND_BACKWARD:
            return (Kind.INPUT_GRAD, i, op.stage)
        case Kind.HIDDEN if program.placement[last] == rank:
            return (Kind.FORWARD, i, last)
        case Kind.STATISTICS:
            return (Kind.HEAD, i, -1)
        case Kind.HIDDEN_GRAD:
            return (Kind.HEAD_GRAD, i, -1)
        case Kind.EMBEDDED:
            return (Kind.EMBED, i, -1)
        case Kind.EMBEDDED_GRAD if program.placement[0] == rank:
            return (Kind.INPUT_GRAD, i, 0)
    return None


def predecessors(program: Program, op: Op, rank: int) -> tuple[Key, ...]:
    """What an operation must come after in its rank's own list, where another rank's part in it does not imply it."""
    i, s, last, where = op.index, op.stage, program.stages - 1, program.placement
    match op.kind:
        case Kind.FORWARD if s > 0:
            return ((Kind.FORWARD, i, s - 1),) if where[s - 1] == rank else ()
        case Kind.FORWARD if program.vocab_barriers:
            return ((Kind.EMBED, i, -1),)
        case Kind.BACKWARD | Kind.INPUT_GRAD:
            own = (Kind.FORWARD, i, s)
            if s < last:
                return (own, (Kind.INPUT_GRAD, i, s + 1)) if where[s + 1] == rank else (own,)
            head = (None, Kind.HEAD, Kind.HEAD_GRAD)[program.vocab_barriers]
            return (own, (head, i, -1)) if head is not None else (own,)
        case Kind.WEIGHT_GRAD:
            return ((Kind.INPUT_GRAD, i, s),)
        case Kind.HEAD:
            return ((Kind.FORWARD, i, last),) if where[last] == rank else ()
        case Kind.HEAD_GRAD:
            return ((Kind.HEAD, i, -1),)
        case Kind.EMBED_GRAD:
            return ((Kind.INPUT_GRAD, i, 0),) if where[0] == rank else ()
    made = producer(program, op, rank)
    return () if made is None else (made,)


def consumers(program: Program, op: Op, rank: int, training: bool = True) -> tuple[Key, ...]:
    """The compute operations in the rank's own list that wait for a receive or collective."""
    i, last = op.index, program.stages - 1
    final = ((Kind.INPUT_GRAD, i, last),) if training and program.placement[last] == rank else ()
    match op.kind:
        case Kind.RECV_FORWARD:
            return ((Kind.FORWARD, i, op.stage),)
        case Kind.RECV_BACKWARD:
            return ((Kind.INPUT_GRAD, i, op.stage),)
        case Kind.HIDDEN:
            return ((Kind.HEAD, i, -1),)
        case Kind.STATISTICS if training:
            return ((Kind.HEAD_GRAD, i, -1), *(final if program.vocab_barriers == 1 else ()))
        case Kind.HIDDEN_GRAD:
            return final
        case Kind.EMBEDDED if program.placement[0] == rank:
            return ((Kind.FORWARD, i, 0),)
        case Kind.EMBEDDED_GRAD:
            return ((Kind.EMBED_GRAD, i, -1),)
    return ()


def awaited(program: Program, op: Op) -> Key | None:
    """The send or collective of other ranks that a compute operation waits for; None where its own list suffices."""
    i, s, last, where = op.index, op.stage, program.stages - 1, program.placement
    match op.kind:
        case Kind.FORWARD if s > 0:
            return (Kind.SEND_FORWARD, i, s - 1) if where[s - 1] != where[s] else None
        case Kind.FORWARD if program.vocab_barriers:
            return (Kind.EMBEDDED, i, -1)
        case Kind.BACKWARD | Kind.INPUT_GRAD if s < last:
            return (Kind.SEND_BACKWARD, i, s + 1) if where[s + 1] != where[s] else None
        case Kind.BACKWARD | Kind.INPUT_GRAD if program.vocab_barriers:
            return (Kind.STATISTICS if program.vocab_barriers == 1 else Kind.HIDDEN_GRAD, i, -1)
        case Kind.HEAD:
            return (Kind.HIDDEN, i, -1)
        case Kind.HEAD_GRAD:
            return (Kind.STATISTICS, i, -1)
        case Kind.EMBED_GRAD:
            return (Kind.EMBEDDED_GRAD, i, -1)
    return None


def expected(program: Program, rank: int, training: bool) -> Iterator[Op]:
    """The communication that the compute of a rank needs, in no particular order, without slots."""
    if len(program.ranks) == 1:
        return
    where, last, stages = program.placement, program.stages - 1, program.stages_of(rank)
    lanes = [Kind.HIDDEN, Kind.STATISTICS, Kind.EMBEDDED] if program.vocab_barriers else []
    if program.vocab_barriers and training:
        lanes += [Kind.EMBEDDED_GRAD] + [Kind.HIDDEN_GRAD] * (program.vocab_barriers == 2)
    for i in range(program.microbatches):
        for s in stages:
            if s > 0 and where[s - 1] != rank:
                yield Op(Kind.RECV_FORWARD, i, s)
                if training:
                    yield Op(Kind.SEND_BACKWARD, i, s)
            if s < last and where[s + 1] != rank:
                yield Op(Kind.SEND_FORWARD, i, s)
                if training:
                    yield Op(Kind.RECV_BACKWARD, i, s)
        for kind in lanes:
            yield Op(kind, i)


def releases(op: Op, training: bool) -> tuple[Key, ...]:
    """The receives whose slots are free once a compute operation is done.

    Autograd and deferred weight gradients read a received tensor until the W (or fused backward) of its stage and
    micro-batch. An evaluation has none: there the forward that consumes it is the end.
    """
    if training and op.kind in (Kind.WEIGHT_GRAD, Kind.BACKWARD):
        return ((Kind.RECV_FORWARD, op.index, op.stage), (Kind.RECV_BACKWARD, op.index, op.stage))
    if not training and op.kind is Kind.FORWARD:
        return ((Kind.RECV_FORWARD, op.index, op.stage),)
    return ()


class SlotCounter:
    """The slots in use on one rank while its list is walked in order."""

    def __init__(self, training: bool) -> None:
        self._training = training
        self._held: dict[Key, int] = {}
        self._used: dict[tuple[int, Kind], dict[int, Key]] = {}

    def step(self, op: Op) -> None:
        """Frees what a compute operation releases."""
        for receive in releases(op, self._training):
            slot = self._held.pop(receive, None)
            if slot is not None:
                used = self._used[receive[2], receive[0]]
                if used.get(slot) == receive:
                    del used[slot]

    def smallest(self, op: Op) -> int:
        """The smallest slot that is free for a receive."""
        used = self._used.get((op.stage, op.kind), {})
        return next(slot for slot in range(len(used) + 1) if slot not in used)

    def holder(self, op: Op) -> Key | None:
        """The receive that has the slot that a receive names."""
        return self._used.get((op.stage, op.kind), {}).get(op.slot)

    def take(self, op: Op) -> None:
        """Notes that a receive has the slot that it names."""
        self._held[key(op)] = op.slot
        self._used.setdefault((op.stage, op.kind), {})[op.slot] = key(op)


def number_slots(ops: Ops, training: bool) -> Ops:
    """A rank's list with each receive in the smallest slot that is free at its place."""
    counter = SlotCounter(training)
    result = []
    for op in ops:
        counter.step(op)
        if op.kind in RECEIVES:
            op = Op(op.kind, op.index, op.stage, counter.smallest(op))
            counter.take(op)
        result.append(op)
    return tuple(result)


def slots(program: Program) -> dict[tuple[int, int, Kind], int]:
    """How many buffers a lowered program's receives need: per (rank, stage, RF or RB)."""
    count: dict[tuple[int, int, Kind], int] = {}
    for rank, ops in enumerate(program.ranks):
        for op in ops:
            if op.kind in RECEIVES:
                where = (rank, op.stage, op.kind)
                count[where] = max(count.get(where, 0), op.slot + 1)
    return count
