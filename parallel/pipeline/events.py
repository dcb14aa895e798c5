"""What each operation of a program waits for and what it brings about: the graph that the simulator runs.

An *event* is what operations bring about together and others wait for: the arrival of a stage's input or of its
output's gradient, and the end of a collective. It comes a latency after the last of its contributors; one of a
lane or a link also waits for the one before it. An operation waits for at most one event and contributes to at most
one; what it needs of its own rank is settled by the order of the list. So every time is a maximum of sums, the same in
whatever order the ranks are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .program import COLLECTIVES, EMBED_LANE, OUTSTANDING_SENDS, RECEIVES, SENDS, Kind, Op, Ops, Program
from .times import Times, spread

ALWAYS, NEVER = 0, 1
"""The event that is there from the start, and the one that never comes: a misplaced operation waits for it."""


@dataclass(frozen=True)
class Graph:
    """Of each rank and position: `needs`, `feeds`, `durations`; of each event: the rest.

    Args:
        needs: the event that the operation waits for.
        feeds: the event that it contributes to at its end; `ALWAYS` where there is none.
        durations: how long it occupies its rank.
        contributors: how many operations an event takes.
        latency: from the last of them to the event.
        before: the event before it in its lane or on its link, where there is one.
        unoccupied: the part of a transfer's latency in which its link is free for the next one.
        collectives, updates: the first event that is a collective of the vocabulary, and the first of the update; those
            below are transfers.
        disorder: why the program cannot run at any times: both ends of a channel, or of a lane, in different orders.
    """

    needs: list[list[int]]
    feeds: list[list[int]]
    durations: list[list[float]]
    contributors: list[int]
    latency: list[float]
    before: dict[int, int]
    unoccupied: float
    collectives: int
    updates: int
    disorder: str | None

    def free(self, event: int, known: list[float]) -> float:
        """When the lane or the link of an event was free for it, given when the events before it came."""
        before = self.before.get(event, ALWAYS)
        return known[before] - self.unoccupied if before and event < self.collectives else known[before]


def build(program: Program, times: Times) -> Graph:
    """The graph of a program, of compute only or lowered.

    Where the program has no sends and receives at all, what a stage made is at the next one a hop later; where it has
    no collectives, they last `collective` from when all their parts are there, and lanes are never busy.

    Raises:
        UserError: the times are for another number of stages or ranks.
    """
    builder = _Builder(program, times)
    for rank, ops in enumerate(program.ranks):
        builder.add(rank, ops)
    return builder.graph()


@dataclass
class _Line:
    """What must be in one order at several ends: the transfers of a channel, or the collectives of a lane."""

    events: list[int] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def put(self, event: int, op: Op) -> None:
        self.events.append(event)
        self.ops.append(op)

    def differs(self, other: _Line) -> int | None:
        """The first position at which both go on, but with something else."""
        common = min(len(self.events), len(other.events))
        if self.events[:common] == other.events[:common]:
            return None
        return next(i for i in range(common) if self.events[i] != other.events[i])


class _Builder:
    """Numbers the events in blocks of m: one block per stage for inputs and gradients, one for each collective."""

    def __init__(self, program: Program, times: Times) -> None:
        self.where, self.m = program.placement, program.microbatches
        self.last, self.p, self.barriers = program.stages - 1, len(program.ranks), program.vocab_barriers
        kinds = {op.kind for ops in program.ranks for op in ops}
        self.lowered = not kinds.isdisjoint(SENDS | RECEIVES)
        self.explicit = not kinds.isdisjoint(COLLECTIVES)
        self.sends: dict[tuple[int, int], _Line] = {}
        self.receives: dict[tuple[int, int], _Line] = {}
        self.lanes: tuple[list[_Line], list[_Line]] = ([], [])
        self.needs: list[list[int]] = []
        self.feeds: list[list[int]] = []
        self.durations: list[list[float]] = []
        self._set_durations(times)
        self._set_events(times)

    def _set_durations(self, times: Times) -> None:
        stages = self.last + 1
        of_stage = [spread(name, getattr(times, name), stages, "stages") for name in ("forward", "backward", "weight")]
        self.forward, self.backward, self.weight = of_stage
        self.fused = [b + w for b, w in zip(self.backward, self.weight, strict=True)]
        names = ("head", "head_grad", "embed", "embed_grad", "reduce", "optimize", "gather")
        of_rank = [spread(name, getattr(times, name), self.p, "ranks") for name in names]
        self.head, self.head_grad, self.embed, self.embed_grad, self.reduce, self.optimize, self.gather = of_rank

    def _set_events(self, times: Times) -> None:
        m, stages = self.m, self.last + 1
        self.contributors, self.latency, self.before = [0, 1], [0.0, 0.0], {}
        for step in (-1, 1):
            for stage, rank in enumerate(self.where):
                remote = 0 <= stage + step < stages and self.where[stage + step] != rank
                self.contributors += [2 if remote and self.lowered else 1] * m
                self.latency += [times.hop + times.link if remote else 0.0] * m
        self.hop, self.queues = times.hop, times.link > 0
        self.input, self.gradient = 2, 2 + stages * m
        hidden = 2 + 2 * stages * m
        self.hidden, self.statistics, self.hidden_grad = hidden, hidden + m, hidden + 2 * m
        self.embedded, self.embedded_grad, self.norm = hidden + 3 * m, hidden + 4 * m, hidden + 5 * m
        one = self.p if self.explicit else 1
        for count in (one, self.p, self.p, self.p, one):
            self.contributors += [count] * m
        self.latency += [times.collective] * (5 * m)
        self.contributors.append(0)
        self.latency.append(times.norm)

    def add(self, rank: int, ops: Ops) -> None:
        """The operations of the next rank."""
        self.rank = rank
        self.stages = frozenset(stage for stage, where in enumerate(self.where) if where == rank)
        self.done: set[int] = set()
        self.gathered = ALWAYS
        for lanes in self.lanes:
            lanes.append(_Line())
        needs, feeds, durations = [], [], []
        find = _HANDLERS
        for op in ops:
            need, feed, duration = find[op.kind](self, op)
            needs.append(need)
            feeds.append(feed)
            durations.append(duration)
        self.needs.append(needs)
        self.feeds.append(feeds)
        self.durations.append(durations)

    def _foreign(self, op: Op) -> bool:
        return op.stage not in self.stages or not 0 <= op.index < self.m

    # Each of the following gives what the operation needs and feeds, and how long it occupies its rank. `done` holds
    # what this rank has computed: a forward pass under the event of its input, a backward pass under its gradient's.

    def forward_pass(self, op: Op) -> tuple[int, int, float]:
        if self._foreign(op):
            return NEVER, ALWAYS, 0.0
        i, s = op.index, op.stage
        mine = self.input + s * self.m + i
        self.done.add(mine)
        need = mine if s else (self.embedded + i if self.barriers else ALWAYS)
        feed = ALWAYS
        if s < self.last:
            if not self.lowered or self.where[s + 1] == self.rank:
                feed = mine + self.m
        elif self.barriers and not self.explicit:
            feed = self.hidden + i
        return need, feed, self.forward[s]

    def backward_pass(self, op: Op) -> tuple[int, int, float]:
        i, s, m = op.index, op.stage, self.m
        if self._foreign(op) or self.input + s * m + i not in self.done:
            return NEVER, ALWAYS, 0.0
        need = mine = self.gradient + s * m + i
        self.done.add(mine)
        if s == self.last:
            need = (ALWAYS, self.statistics + i, self.hidden_grad + i)[self.barriers]
        feed = ALWAYS
        if s:
            if not self.lowered or self.where[s - 1] == self.rank:
                feed = mine - m
        elif self.barriers and not self.explicit:
            feed = self.embedded_grad + i
        return need, feed, self.fused[s] if op.kind is Kind.BACKWARD else self.backward[s]

    def weight_grad(self, op: Op) -> tuple[int, int, float]:
        if self._foreign(op) or self.gradient + op.stage * self.m + op.index not in self.done:
            return NEVER, ALWAYS, 0.0
        return ALWAYS, ALWAYS, self.weight[op.stage]

    def vocabulary(self, op: Op) -> tuple[int, int, float]:
        kind, i, rank = op.kind, op.index, self.rank
        if not (self.barriers and 0 <= i < self.m):
            return NEVER, ALWAYS, 0.0
        if kind is Kind.HEAD:
            need, feed, duration = self.hidden + i, self.statistics + i, self.head[rank]
        elif kind is Kind.HEAD_GRAD:
            feed = self.hidden_grad + i if self.barriers == 2 else ALWAYS
            need, duration = self.statistics + i, self.head_grad[rank]
            if self.statistics + i not in self.done:
                need = NEVER
        elif kind is Kind.EMBED:
            need, feed, duration = ALWAYS, self.embedded + i, self.embed[rank]
        else:
            return self.embedded_grad + i, ALWAYS, self.embed_grad[rank]
        self.done.add(self.hidden_grad + i if kind is Kind.HEAD_GRAD else feed)
        return need, ALWAYS if self.explicit else feed, duration

    def send(self, op: Op) -> tuple[int, int, float]:
        s, forward = op.stage, op.kind is Kind.SEND_FORWARD
        to = s + 1 if forward else s - 1
        made = (self.input if forward else self.gradient) + s * self.m + op.index
        if self._foreign(op) or not 0 <= to <= self.last or self.where[to] == self.rank or made not in self.done:
            return NEVER, ALWAYS, 0.0
        event = made + (self.m if forward else -self.m)
        channel = (self.rank, self.where[to])
        line = self.sends.get(channel) or self.sends.setdefault(channel, _Line())
        need = line.events[-OUTSTANDING_SENDS] if len(line.events) >= OUTSTANDING_SENDS else ALWAYS
        if self.queues and line.events:
            self.before[event] = line.events[-1]
        line.put(event, op)
        return need, event, 0.0

    def receive(self, op: Op) -> tuple[int, int, float]:
        s, forward = op.stage, op.kind is Kind.RECV_FORWARD
        source = s - 1 if forward else s + 1
        if self._foreign(op) or not 0 <= source <= self.last or self.where[source] == self.rank:
            return NEVER, ALWAYS, 0.0
        event = (self.input if forward else self.gradient) + s * self.m + op.index
        channel = (self.where[source], self.rank)
        line = self.receives.get(channel) or self.receives.setdefault(channel, _Line())
        line.put(event, op)
        return ALWAYS, event, 0.0

    def collective(self, op: Op) -> tuple[int, int, float]:
        kind, i, m = op.kind, op.index, self.m
        if not (self.barriers and 0 <= i < m):
            return NEVER, ALWAYS, 0.0
        if kind is Kind.HIDDEN:
            event, source = self.hidden + i, self.input + self.last * m + i
            missing = self.where[self.last] == self.rank and source not in self.done
        elif kind is Kind.EMBEDDED_GRAD:
            event = self.embedded_grad + i
            missing = self.where[0] == self.rank and self.gradient + i not in self.done
        else:
            starts = {
                Kind.STATISTICS: self.statistics,
                Kind.HIDDEN_GRAD: self.hidden_grad,
                Kind.EMBEDDED: self.embedded,
            }
            event = starts[kind] + i
            missing = event not in self.done
        if missing:
            return NEVER, ALWAYS, 0.0
        lane = self.lanes[kind in EMBED_LANE][self.rank]
        if lane.events:
            self.before[event] = lane.events[-1]
        lane.put(event, op)
        return ALWAYS, event, 0.0

    def update(self, op: Op) -> tuple[int, int, float]:
        if op.kind is Kind.REDUCE:
            return ALWAYS, ALWAYS, self.reduce[self.rank]
        if op.kind is Kind.NORM:
            self.contributors[self.norm] += 1
            self.done.add(self.norm)
            return ALWAYS, self.norm, 0.0
        if op.kind is Kind.OPTIMIZE:
            return self.norm if self.norm in self.done else ALWAYS, ALWAYS, self.optimize[self.rank]
        event = len(self.contributors)
        self.contributors.append(1)
        self.latency.append(self.gather[self.rank])
        if self.gathered:
            self.before[event] = self.gathered
        self.gathered = event
        return ALWAYS, event, 0.0

    def graph(self) -> Graph:
        """All that was added."""
        return Graph(
            needs=self.needs,
            feeds=self.feeds,
            durations=self.durations,
            contributors=self.contributors,
            latency=self.latency,
            before=self.before,
            unoccupied=self.hop,
            collectives=self.hidden,
            updates=self.norm,
            disorder=next(self._disorders(), None),
        )

    def _disorders(self) -> Iterator[str]:
        for (source, to), sent in self.sends.items():
            received = self.receives.get((source, to), _Line())
            at = sent.differs(received)
            if at is not None:
                yield (
                    f"rank {source} sends {sent.ops[at]} to rank {to} as number {at} of their channel, where rank {to} "
                    f"receives {received.ops[at]}"
                )
        for lane in self.lanes:
            for rank, line in enumerate(lane):
                at = line.differs(lane[0])
                if at is not None:
                    first, other = lane[0].ops[at], line.ops[at]
                    yield f"collective number {at} of a lane is {first} on rank 0 and {other} on rank {rank}"


_HANDLERS = {
    Kind.FORWARD: _Builder.forward_pass,
    Kind.BACKWARD: _Builder.backward_pass,
    Kind.INPUT_GRAD: _Builder.backward_pass,
    Kind.WEIGHT_GRAD: _Builder.weight_grad,
    **dict.fromkeys((Kind.HEAD, Kind.HEAD_GRAD, Kind.EMBED, Kind.EMBED_GRAD), _Builder.vocabulary),
    **dict.fromkeys(SENDS, _Builder.send),
    **dict.fromkeys(RECEIVES, _Builder.receive),
    **dict.fromkeys(COLLECTIVES, _Builder.collective),
    **dict.fromkeys((Kind.REDUCE, Kind.NORM, Kind.OPTIMIZE, Kind.GATHER), _Builder.update),
}
