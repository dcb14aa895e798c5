"""Lowering: adds to a program of compute the communication that it needs, and gives receives their slots.

Compute keeps its order. Sends follow their producer at once; receives are posted before send and consumer are ready, in
the order in which the other rank sends; collectives of the vocabulary get one order per lane, the order in which they
become ready in simulated time, and each rank joins them as early as that order and its own compute allow.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

from .check import check_program
from .communication import (
    Key,
    Relation,
    Row,
    channel,
    consumers,
    counterpart,
    expected_communication,
    is_lowered,
    is_training,
    lanes,
    number_slots,
    places,
    producer,
)
from .deadlock import run_in_order, waits
from .kind import Role
from .needs import KINDS, Kinds
from .program import OUTSTANDING_SENDS, Op, Ops, Program
from .simulate import simulate
from .times import Times


def lower(program: Program, *, ahead: int = 1, times: Times = Times()) -> Program:  # noqa: B008 (frozen)
    """The program with communication and slots. One rank needs none: its program is returned as it is.

    Args:
        program: compute, and possibly the update at the end of each rank's list.
        ahead: how many compute operations before its consumer a receive is posted; earlier where the channel's order
            demands it, or where at these times the send or the consumer would be ready before.
        times: for that, and for the order of the vocabulary's collectives; not used for an evaluation.

    Raises:
        ProgramError: the program is not correct, or cannot finish.
        ValueError: it has communication already.
    """
    if is_lowered(program):
        raise ValueError("the program is lowered already")
    if ahead < 0:
        raise ValueError(f"ahead is {ahead}: it must be at least 0")
    check_program(program)
    if len(program.ranks) == 1:
        return program
    training = is_training(program)
    compute = [tuple(op for op in ops if op.kind.computes) for ops in program.ranks]
    # The update waits for every microbatch, so nothing that is added here has its place behind it.
    tails = [tuple(op for op in ops if not op.kind.computes) for ops in program.ranks]
    if not training:
        # Nothing but waiting senders bounds how far fast first stages run ahead; at equal times they hardly do.
        times = Times()
    plan = _Plan.of(replace(program, ranks=tuple(compute)), times)
    sends = [_sends(program, rank, place, training) for rank, place in enumerate(plan.places)]
    posts = _posts(program, plan, sends, ahead, times.hop + times.link)
    orders = _lane_orders(program, plan, training) if program.vocab_barriers else []
    ranks = []
    for rank, ops in enumerate(compute):
        joins = _joins(program, rank, plan.places[rank], orders)
        ops = _assemble(ops, sends[rank], joins, posts[rank])
        ranks.append(number_slots(ops, training) + tails[rank])
    return replace(program, ranks=tuple(ranks))


def forward_only(placement: tuple[int, ...], microbatches: int, vocab_barriers: int = 0) -> Program:
    """An evaluation: each stage's forwards in order, and with a balanced vocabulary IF and S.

    Rounds of one forward per rank: each takes the deepest of its stages whose input is there, so that a microbatch
    under way is finished before another is begun. S stands two rounds after its last forward, and IF one before its
    first, so that a collective has a round's time. A slot of a receive is in use until the forward that consumes it.

    Args:
        placement: the rank that holds each stage.
        microbatches: of the evaluation, m.
        vocab_barriers: of the training program; only whether it is 0 matters.
    """
    ranks, last = max(placement) + 1, len(placement) - 1
    ops: list[list[Op]] = [[] for _ in range(ranks)]
    done = [0] * len(placement)
    embedded = headed = arrived = 0
    while done[last] < microbatches or (vocab_barriers and headed < microbatches):
        # All ranks decide by what was done when the round began: within a round nothing reaches another rank.
        before = tuple(done)
        wanted = min(microbatches, before[0] + 2) if vocab_barriers else 0
        scored, arrived = arrived, before[last] if vocab_barriers else 0
        for rank in range(ranks):
            ops[rank] += [Op(Kinds.EMBED, i) for i in range(embedded, wanted)]
            ops[rank] += [Op(Kinds.HEAD, i) for i in range(headed, scored)]
        embedded, headed = wanted, scored
        busy: set[int] = set()
        for stage in range(last, -1, -1):
            # From the last stage down: the deepest of a rank's stages goes first, and takes the rank for this round.
            if placement[stage] not in busy and before[stage] < (before[stage - 1] if stage else microbatches):
                ops[placement[stage]].append(Op(Kinds.FORWARD, before[stage], stage))
                done[stage] += 1
                busy.add(placement[stage])
    return Program(microbatches, placement, tuple(tuple(mine) for mine in ops), vocab_barriers)


@dataclass(frozen=True)
class _Plan:
    """The simulated run of a program of compute, per rank and position.

    Args:
        places: the position of each operation.
        starts, ends: when it runs.
        turns: its place in one order of the operations of all ranks, by their ends, in which each comes after all that
            it needs. What is decided by turns cannot deadlock: the ranks can follow that order.
    """

    places: list[dict[Key, int]]
    starts: list[list[float]]
    ends: list[list[float]]
    turns: list[list[int]]

    @staticmethod
    def of(program: Program, times: Times) -> _Plan:
        graph, spans = waits(program), simulate(program, times).spans
        flat = [end for mine in spans for _, end in mine]
        turns = [0] * len(flat)
        # Sorting is stable: where ends are equal, as with passes of no duration, the order of `run` stays.
        for turn, number in enumerate(sorted(run_in_order(program, graph).order, key=flat.__getitem__)):
            turns[number] = turn
        return _Plan(
            [places(ops) for ops in program.ranks],
            [[start for start, _ in mine] for mine in spans],
            [[end for _, end in mine] for mine in spans],
            [turns[first:after] for first, after in pairwise(graph.starts)],
        )


def _lane_orders(program: Program, plan: _Plan, training: bool) -> list[Ops]:
    """Each lane's collectives in the order in which their last producers end.

    So what a collective waits for comes before what waits for it, and before what waits for any later one of its lane.
    """
    m = program.microbatches
    ready: dict[Row, list[int]] = {}
    for rank, place in enumerate(plan.places):
        turns, made = plan.turns[rank], Relation(lambda op, rank=rank: (producer(program, op, rank),))
        for row in expected_communication(program, rank, training):
            if row[0].role is Role.COLLECTIVE:
                # On a rank that only receives (a broadcast), the collective waits for nothing: turn −1.
                latest = ready.setdefault(row, [-1] * m)
                for kind, stage in made[row]:
                    own = [turns[place[kind, i, stage]] for i in range(m)]
                    ready[row] = [*map(max, latest, own)]
    orders = []
    for lane in lanes():
        tokens = [
            (turn, Op(kind, i)) for (kind, _), row in ready.items() if kind.lane == lane for i, turn in enumerate(row)
        ]
        orders.append(tuple(op for _, op in sorted(tokens, key=lambda token: token[0])))
    return orders


def _joins(program: Program, rank: int, place: dict[Key, int], orders: list[Ops]) -> dict[int, list[Op]]:
    """The collectives that a rank joins before its n-th compute operation."""
    joins: dict[int, list[Op]] = {}
    made = Relation(lambda op: (producer(program, op, rank),))
    for order in orders:
        at = 0  # never falls: a lane's order holds on every rank, also where a later one could be joined earlier
        for op in order:
            for kind, stage in made[op.kind, op.stage]:
                at = max(at, place[kind, op.index, stage] + 1)
            joins.setdefault(at, []).append(op)
    return joins


def _sends(program: Program, rank: int, place: dict[Key, int], training: bool) -> dict[int, Op]:
    """The send that follows a rank's n-th compute operation, where there is one, in order."""
    sends = {}
    made = Relation(lambda op: (producer(program, op, rank),))
    for row in expected_communication(program, rank, training):
        if row[0].role is Role.SEND:
            for kind, stage in made[row]:
                for i in range(program.microbatches):
                    sends[place[kind, i, stage]] = Op(row[0], i, row[1])
    return dict(sorted(sends.items()))


@dataclass(frozen=True)
class _Post:
    """A receive, posted before the rank's `at`-th compute operation for its `user`-th."""

    at: int
    user: int
    op: Op


def _posts(program: Program, plan: _Plan, sends: list[dict[int, Op]], ahead: int, hop: float) -> list[list[_Post]]:
    """The receives of each rank, in the order in which they are posted; per channel that of the sends."""
    # Receives carry no tag, so they take the order in which the other end sends; that of consumption may differ.
    channels: dict[tuple[int, int], list[tuple[int, Op]]] = {}
    for rank, mine in enumerate(sends):
        for made, op in mine.items():
            channels.setdefault(channel(op, rank, program), []).append((made, op))
    posts: list[list[_Post]] = [[] for _ in sends]
    for (source, destination), row in channels.items():
        starts, ends, turns = plan.starts[destination], plan.ends[destination], plan.turns[destination]
        place, users = plan.places[destination], Relation(lambda op, rank=destination: consumers(program, op, rank))
        # From the channel's last receive to its first, each no later than the one after it: `latest` only falls.
        latest, limits = len(starts), []
        for n in reversed(range(len(row))):
            sent = row[n][1]
            ((kind, stage),) = users[KINDS[sent.kind.pair], sent.stage + sent.kind.toward]
            user = place[kind, sent.index, stage]
            # Posted by the time of its send, it keeps no later send waiting, however far the source runs ahead; posted
            # a hop before the consumer starts, it delays nothing.
            in_time = bisect_right(ends, min(plan.ends[source][row[n][0]], starts[user] - hop))
            latest = min(latest, max(0, user - ahead), in_time)
            # A source that sends further ahead than the limit waits for this receive: it must be posted before the
            # operation that sends so far ahead has its turn, or both ranks could wait for each other.
            if n + OUTSTANDING_SENDS < len(row):
                waiting = row[n + OUTSTANDING_SENDS][0]
                latest = min(latest, bisect_left(turns, plan.turns[source][waiting]))
            limits.append(_Post(latest, user, counterpart(row[n][1])))
        needed = 0
        for post in reversed(limits):
            needed = max(needed, post.user)  # keeps the channel's order among receives that are posted together
            posts[destination].append(replace(post, user=needed))
    return [sorted(mine, key=lambda post: (post.at, post.user)) for mine in posts]


def _assemble(compute: Ops, sends: dict[int, Op], joins: dict[int, list[Op]], posts: list[_Post]) -> Ops:
    """A rank's list: after each compute operation its send, collectives, and receives."""
    receives: dict[int, list[Op]] = {}
    for post in posts:
        receives.setdefault(post.at, []).append(post.op)
    result: list[Op] = []
    for n in range(len(compute) + 1):
        # What others wait for goes out before this rank asks for anything itself.
        result += [sends[n - 1]] if n - 1 in sends else []
        result += joins.get(n, [])
        result += receives.get(n, [])
        result += compute[n : n + 1]
    return tuple(result)
