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

from .communication import applies, lanes, stage_of
from .kind import Acts, Kind, Place, Role
from .needs import KINDS, Kinds, flows, stands_for
from .program import OUTSTANDING_SENDS, Op, Ops, Program
from .times import Times

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
        collectives, copies, updates: the first event that is a collective of the vocabulary, a copy between device and
            host, and of the update; those below are transfers.
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
    copies: int
    updates: int
    disorder: str | None

    def free(self, event: int, known: list[float]) -> float:
        """When the lane or the link of an event was free for it, given when the events before it came."""
        before = self.before.get(event, ALWAYS)
        # A link carries one message at a time but is busy only while it sends: the hop at the end of a latency is
        # travel, during which the next message may already leave. A lane is busy to the very end.
        return known[before] - self.unoccupied if before and event < self.collectives else known[before]


def build_graph(program: Program, times: Times) -> Graph:
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


@dataclass(frozen=True, slots=True)
class _Pass:
    """A kind of compute operation at one stage of a rank (or on the rank): events without the microbatch's number.

    Args:
        need: what it waits for.
        feed: what it contributes to.
        after: marks of what must come before it in its own list.
        mark: of itself.
        duration: how long it occupies its rank.
    """

    need: int
    feed: int
    after: tuple[int, ...]
    mark: int
    duration: float


_FOREIGN = (NEVER, ALWAYS, 0.0)
"""An operation that does not belong to its rank waits for what never comes."""


class _Builder:
    """Numbers the events in blocks of m: for each transfer one per stage, for each collective one.

    Marks of what a rank has computed are numbered in the same way, for each kind one block per stage.
    """

    def __init__(self, program: Program, times: Times) -> None:
        self.program, self.times = program, times
        self.where, self.m, self.p = program.placement, program.microbatches, len(program.ranks)
        self.last = program.stages - 1
        kinds = {op.kind for ops in program.ranks for op in ops}
        # A program of compute alone has no operation that would bring anything to another rank: the end of the compute
        # does, and is then the only contributor of the event. Transfers and collectives may be missing separately.
        self.lowered = any(kind.transfers for kind in kinds)
        self.explicit = any(kind.role is Role.COLLECTIVE for kind in kinds)
        self.sends: dict[tuple[int, int], _Line] = {}
        self.receives: dict[tuple[int, int], _Line] = {}
        self.lanes: dict[str, list[_Line]] = {lane: [] for lane in lanes()}
        self.needs: list[list[int]] = []
        self.feeds: list[list[int]] = []
        self.durations: list[list[float]] = []
        times.expect(program.stages, self.p)
        self.marks = {kind: n * program.stages * self.m for n, kind in enumerate(KINDS.values()) if kind.local}
        self.engines: dict[str, int] = {}
        """The last copy of each engine of the rank."""
        self.carriers: dict[Kind, list[Kind]] = {}
        """What can bring the result of a kind to other ranks."""
        for kind in KINDS.values():
            if kind.role in (Role.SEND, Role.COLLECTIVE):
                self.carriers.setdefault(flows(kind.token)[0].source, []).append(kind)
        self._set_events()

    def _set_events(self) -> None:
        m, stages, times = self.m, self.program.stages, self.times
        # Event ALWAYS waits for nobody, event NEVER for a contributor that no operation is: both need no special case.
        self.contributors, self.latency, self.before = [0, 1], [0.0, 0.0], {}
        self.hop, self.queues = times.hop, times.link > 0
        self.blocks: dict[Kind, int] = {}
        """The first event of what a transfer (by its receive) or a collective brings."""
        for kind in KINDS.values():
            if kind.role is Role.RECEIVE:
                self.blocks[kind] = len(self.contributors)
                for stage, rank in enumerate(self.where):
                    other = stage + kind.toward
                    # At the turn of a V two neighbouring stages share a rank: what one makes is there for the other.
                    remote = 0 <= other < stages and self.where[other] != rank
                    # Memory to memory, thus a transfer happens when both ends have posted it.
                    self.contributors += [2 if remote and self.lowered else 1] * m
                    self.latency += [times.hop + times.link if remote else 0.0] * m
        self.collectives = len(self.contributors)
        for kind in KINDS.values():
            if kind.role is Role.COLLECTIVE:
                self.blocks[kind] = len(self.contributors)
                # A broadcast from one stage has one source, a sum has all ranks; where the collective is an operation,
                # every rank has to join it whatever it brings.
                of_one = flows(kind.token)[0].source.acts is Acts.STAGE and not self.explicit
                self.contributors += [1 if of_one else self.p] * m
                self.latency += [times.collective] * m
        self.copies = len(self.contributors)
        for kind in KINDS.values():
            if kind.role is Role.COPY:
                self.blocks[kind] = len(self.contributors)
                for stage, rank in enumerate(self.where):
                    self.contributors += [1] * m
                    self.latency += [times.latency(Op(kind, 0, stage), rank)] * m
        self.norm = len(self.contributors)
        self.contributors.append(0)
        self.latency.append(times.norm)

    def add(self, rank: int, ops: Ops) -> None:
        """The operations of the next rank."""
        self.rank = rank
        self.stages = frozenset(self.program.stages_of(rank))
        self.done: set[int] = set()
        self.gathered = ALWAYS
        self.engines = {}
        self.passes: dict[tuple[Kind, int], _Pass] = {}
        for lane in self.lanes.values():
            lane.append(_Line())
        # Loops over hundreds of thousands of operations: three flat lists instead of an object for each.
        needs, feeds, durations = [], [], []
        for op in ops:
            role = op.kind.role
            need, feed, duration = self.compute(op) if role is Role.COMPUTE else _ADD[role](self, op)
            needs.append(need)
            feeds.append(feed)
            durations.append(duration)
        self.needs.append(needs)
        self.feeds.append(feeds)
        self.durations.append(durations)

    # Each of the following gives what the operation needs and feeds, and how long it occupies its rank.

    def compute(self, op: Op) -> tuple[int, int, float]:
        i = op.index
        found = self.passes.get((op.kind, op.stage))
        if found is None:
            if self._is_foreign(op):
                return _FOREIGN
            # What the m microbatches of a pass need differs by their number alone, which is added below.
            found = self.passes[op.kind, op.stage] = self._pass(op)
        if not 0 <= i < self.m:
            return _FOREIGN
        # Needs of the rank's own are met by the order of its list, or never: they cost no event.
        done, need, feed = self.done, found.need, found.feed
        for mark in found.after:
            if mark + i not in done:
                return _FOREIGN
        done.add(found.mark + i)
        return need and need + i, feed and feed + i, found.duration  # ALWAYS, which is 0, is that of all microbatches

    def _is_foreign(self, op: Op) -> bool:
        if op.kind.acts is Acts.STAGE:
            return op.stage not in self.stages
        return op.stage != -1 or (op.kind.balanced and not self.program.vocab_barriers)

    def _mark(self, kind: Kind, stage: int) -> int:
        return self.marks[stands_for(kind)] + max(stage, 0) * self.m

    def _pass(self, op: Op) -> _Pass:
        kind, s, program = op.kind, op.stage, self.program
        need, after = ALWAYS, []
        for each in kind.needs:
            if not applies(each, program, s):
                continue
            stage = stage_of(each.place, program, s)
            # A collective brings what all ranks have made, its own part included: that one is a matter of order too.
            if each.place is Place.SAME or (each.place is Place.EVERYWHERE and kind.acts is Acts.RANK):
                after.append(self._mark(KINDS[each.kind], stage))
            if each.by:
                need = self._event(each.by, s)
        return _Pass(
            need, self._feed(stands_for(kind), s), tuple(after), self._mark(kind, s), self.times.of(op, self.rank)
        )

    def _event(self, carrier: str, stage: int) -> int:
        """What a transfer or a copy brings to a stage, or a collective."""
        kind = KINDS[carrier]
        if kind.lane:
            return self.blocks[kind]
        return self.blocks[KINDS[kind.pair] if kind.pair else kind] + stage * self.m

    def _feed(self, kind: Kind, stage: int) -> int:
        """What the end of an operation brings about by itself: nothing where a send or a collective does it."""
        for carrier in self.carriers.get(kind, ()):
            if carrier.lane:
                flow = flows(carrier.token)[0]
                of_one = flow.source.acts is Acts.STAGE
                if of_one and stage != stage_of(flow.need.place, self.program, stage):
                    continue  # another stage than the one whose result is broadcast
                if self.program.vocab_barriers and not self.explicit and self._carries(carrier):
                    return self.blocks[carrier]
            elif 0 <= (to := stage + carrier.toward) <= self.last and (not self.lowered or self.where[to] == self.rank):
                return self._event(carrier.token, to)
        return ALWAYS

    def _carries(self, collective: Kind) -> bool:
        return any(self.program.vocab_barriers in flow.need.barriers for flow in flows(collective.token))

    def transfer(self, op: Op) -> tuple[int, int, float]:
        kind, s = op.kind, op.stage
        other = s + kind.toward
        if self._is_foreign(op) or not 0 <= op.index < self.m:
            return _FOREIGN
        if not 0 <= other <= self.last or self.where[other] == self.rank:
            return _FOREIGN
        if kind.role is Role.RECEIVE:
            event = self.blocks[kind] + s * self.m + op.index
            channel = (self.where[other], self.rank)
            line = self.receives.get(channel) or self.receives.setdefault(channel, _Line())
            line.put(event, op)
            return ALWAYS, event, 0.0
        if self._mark(flows(kind.token)[0].source, s) + op.index not in self.done:
            return _FOREIGN
        # The event is the arrival, numbered by where it arrives: send and receive find each other in it.
        event = self._event(kind.token, other) + op.index
        channel = (self.rank, self.where[other])
        line = self.sends.get(channel) or self.sends.setdefault(channel, _Line())
        # A rank holds on when too many of its sends have not been taken: then it waits for the oldest one's arrival.
        need = line.events[-OUTSTANDING_SENDS] if len(line.events) >= OUTSTANDING_SENDS else ALWAYS
        if self.queues and line.events:
            self.before[event] = line.events[-1]
        line.put(event, op)
        return need, event, 0.0

    def collective(self, op: Op) -> tuple[int, int, float]:
        if not (self.program.vocab_barriers and 0 <= op.index < self.m):
            return _FOREIGN
        flow = flows(op.kind.token)[0]
        stage = -1 if flow.source.acts is Acts.RANK else stage_of(flow.need.place, self.program, -1)
        # In a broadcast only the source has to be ready; the others join to be given something.
        mine = stage < 0 or self.where[stage] == self.rank
        if mine and self._mark(flow.source, stage) + op.index not in self.done:
            return _FOREIGN
        event = self.blocks[op.kind] + op.index
        lane = self.lanes[op.kind.lane][self.rank]
        if lane.events:
            self.before[event] = lane.events[-1]
        lane.put(event, op)
        return ALWAYS, event, 0.0

    def copy(self, op: Op) -> tuple[int, int, float]:
        made = self.compute(op)
        if made is _FOREIGN:
            return _FOREIGN
        event = self._event(op.kind.token, op.stage) + op.index
        shared = self.times.one_engine and op.kind.engine in ("out", "in")
        engine = "" if shared else op.kind.engine
        if engine in self.engines:
            self.before[event] = self.engines[engine]
        self.engines[engine] = event
        return ALWAYS, event, 0.0

    def update(self, op: Op) -> tuple[int, int, float]:
        kind = op.kind
        if kind is Kinds.NORM:
            # A program may leave it out on some ranks, or all: who has none in its list is not waited for.
            self.contributors[self.norm] += 1
            self.done.add(-1)
            return ALWAYS, self.norm, 0.0
        if not kind.started:
            waits = kind.phase > Kinds.NORM.phase and -1 in self.done
            return self.norm if waits else ALWAYS, ALWAYS, self.times.of(op, self.rank)
        # It runs beside the compute, after the one before it of its rank.
        event = len(self.contributors)
        self.contributors.append(1)
        self.latency.append(self.times.latency(op, self.rank))
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
            collectives=self.collectives,
            copies=self.copies,
            updates=self.norm,
            disorder=next(self._disorders(), None),
        )

    def _disorders(self) -> Iterator[str]:
        for (source, to), sent in self.sends.items():
            # Transfers of a channel carry no tag: the n-th send meets the n-th receive. A list that is merely shorter
            # stops the program only if something waits for the rest, which is found by running it.
            received = self.receives.get((source, to), _Line())
            at = sent.differs(received)
            if at is not None:
                yield (
                    f"rank {source} sends {sent.ops[at]} to rank {to} as number {at} of their channel, where rank {to} "
                    f"receives {received.ops[at]}"
                )
        for lane in self.lanes.values():
            for rank, line in enumerate(lane):
                at = line.differs(lane[0])
                if at is not None:
                    first, other = lane[0].ops[at], line.ops[at]
                    yield f"collective number {at} of a lane is {first} on rank 0 and {other} on rank {rank}"


_ADD = {
    Role.COMPUTE: _Builder.compute,
    Role.SEND: _Builder.transfer,
    Role.RECEIVE: _Builder.transfer,
    Role.COLLECTIVE: _Builder.collective,
    Role.COPY: _Builder.copy,
    Role.MEMORY: _Builder.compute,
    Role.UPDATE: _Builder.update,
}
