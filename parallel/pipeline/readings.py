"""What a timeline tells: spans, work, idle time and its causes, and the critical path."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

from .events import ALWAYS, Graph, build_graph
from .kind import Role
from .program import Op
from .simulate import Timeline

_EQUAL = 1e-12


@dataclass(frozen=True)
class Utilization:
    """How a timeline uses its ranks; all times in the timeline's unit, one element per rank.

    Args:
        makespan: from 0 to the end of the last operation.
        span: from the start of the rank's first computation to the end of its last one; 0 without any.
        work: all its computation, the vocabulary's included.
        idle: span − work.
        longest: the rank with the longest span.
        bubble_rate: (span − work) / span of that rank: the measure of the zero-bubble papers, in which ranks may start
            and end staggered.
        bubble_rate_makespan: (makespan − work) / makespan of that rank.
    """

    makespan: float
    span: tuple[float, ...]
    work: tuple[float, ...]
    idle: tuple[float, ...]
    longest: int
    bubble_rate: float
    bubble_rate_makespan: float


def utilization(timeline: Timeline) -> Utilization:
    """Spans, work and bubble rates."""
    span, work = [], []
    for ops, spans in zip(timeline.program.ranks, timeline.spans, strict=True):
        # A rank's list is in order of time, so its first and last computation are the ends of its span.
        busy = [times for op, times in zip(ops, spans, strict=True) if op.kind.computes]
        span.append(busy[-1][1] - busy[0][0] if busy else 0.0)
        work.append(sum(end - start for start, end in busy))
    makespan, most = timeline.makespan, max(span)
    # Sums in another order must not decide which of several equal ranks it is.
    longest = next(rank for rank, each in enumerate(span) if each >= most * (1 - _EQUAL))
    return Utilization(
        makespan=makespan,
        span=tuple(span),
        work=tuple(work),
        idle=tuple(s - w for s, w in zip(span, work, strict=True)),
        longest=longest,
        bubble_rate=(most - work[longest]) / most if most else 0.0,
        bubble_rate_makespan=(makespan - work[longest]) / makespan if makespan else 0.0,
    )


@dataclass(frozen=True)
class Bubble:
    """What a rank does with the time in which it does not compute, as parts of the makespan.

    Args:
        warm_up: before its first computation.
        dependency: waits for another rank to compute (and, in a lowered program, to send) what it needs.
        communication: waits for what the other rank has sent already.
        barrier: waits for a collective of the vocabulary, thus for the slowest rank and the collective itself.
        queue: waits to send, with as many sends under way on the channel as may be.
        offload: waits for a copy between device and host.
        update: reduces or updates between computations.
        overhead: none of these; nothing in a simulated timeline, what is not explained in a recorded one.
        tail: after its last computation.
    """

    warm_up: float = 0.0
    dependency: float = 0.0
    communication: float = 0.0
    barrier: float = 0.0
    queue: float = 0.0
    offload: float = 0.0
    update: float = 0.0
    overhead: float = 0.0
    tail: float = 0.0

    @property
    def total(self) -> float:
        """makespan − work."""
        return sum(getattr(self, each.name) for each in fields(self))

    @property
    def idle(self) -> float:
        """span − work: all but warm-up and tail."""
        return self.total - self.warm_up - self.tail


def bubbles(timeline: Timeline) -> tuple[Bubble, ...]:
    """The causes of each rank's bubble.

    Raises:
        UserError: the timeline's times are for another number of stages or ranks.
    """
    replayed = _Replay(timeline)
    return tuple(_bubble(replayed, rank) for rank in range(len(timeline.spans)))


def _bubble(replayed: _Replay, rank: int) -> Bubble:
    timeline = replayed.timeline
    ops, spans = timeline.program.ranks[rank], timeline.spans[rank]
    computes = [position for position, op in enumerate(ops) if op.kind.computes]
    if not computes:
        return Bubble(warm_up=timeline.makespan)
    first, last = computes[0], computes[-1]
    causes = ("dependency", "communication", "barrier", "queue", "offload", "update", "overhead")
    parts: dict[str, float] = dict.fromkeys(causes, 0.0)
    clock = spans[first][1]  # until when the rank is accounted for
    for position in range(first + 1, last + 1):
        start, end = spans[position]
        if start > clock:
            for cause, amount in replayed.causes(rank, position, clock):
                parts[cause] += amount
        # What is only started takes none of the rank's time: its end lies beside the compute, and may come much later.
        if ops[position].kind.started:
            clock = max(clock, start)
            continue
        if not ops[position].kind.computes:
            parts["update"] += end - start
        clock = end
    return Bubble(warm_up=spans[first][0], tail=timeline.makespan - spans[last][1], **parts)


class Edge(StrEnum):
    """Why a step of the critical path did not start earlier."""

    START = "start"
    """It is the first."""
    ORDER = "order"
    """The rank was busy with the operation before it."""
    TRANSFER = "transfer"
    """What it needs came from the step before it, from another stage."""
    COLLECTIVE = "collective"
    """The step before it was the last part of a collective of the vocabulary, or of the norm."""
    COPY = "copy"
    """A copy between device and host, which the step before it started, had to end."""
    QUEUE = "queue"
    """Too many sends were under way on its channel; the step before it is the oldest of them."""
    LANE = "lane"
    """The collective before it in its lane, or the message before it on its link, was still under way."""


@dataclass(frozen=True)
class Step:
    """An operation on the critical path: `program.ranks[rank][position]`.

    Between the end of a step and the start of the next there is nothing but the latency of the edge.
    """

    rank: int
    position: int
    op: Op
    start: float
    end: float
    edge: Edge


def critical_path(timeline: Timeline) -> tuple[Step, ...]:
    """A chain of operations, from time 0 to the makespan, in which none could start before the one before it ended.

    Raises:
        UserError: the timeline's times are for another number of stages or ranks.
    """
    return _Replay(timeline).path()


class _Replay:
    """When the events of a timeline came, and which operation brought each of them about."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.graph: Graph = build_graph(timeline.program, timeline.times)
        size = len(self.graph.contributors)
        self.latest = [0.0] * size
        self.last: list[tuple[int, int]] = [(-1, -1)] * size
        # The timeline may be a recorded one: what came last is read off its spans, not computed from durations.
        latest, last = self.latest, self.last
        for rank, (feeds, spans) in enumerate(zip(self.graph.feeds, timeline.spans, strict=True)):
            ops = timeline.program.ranks[rank]
            for position, event in enumerate(feeds):
                if event:
                    # A started operation contributes by starting, a computation by ending.
                    when = spans[position][not ops[position].kind.started]
                    if when >= latest[event]:
                        latest[event] = when
                        last[event] = (rank, position)
        self.known = [when + latency for when, latency in zip(latest, self.graph.latency, strict=True)]
        # `before` was filled in the order of the lists, in which an event's predecessor always stands before it.
        for event in self.graph.before:
            self.known[event] = max(latest[event], self.graph.free(event, self.known)) + self.graph.latency[event]

    def causes(self, rank: int, position: int, since: float) -> list[tuple[str, float]]:
        """Parts of the wait from `since` to the start of an operation."""
        event, start = self.graph.needs[rank][position], self.timeline.spans[rank][position][0]
        if event == ALWAYS:
            return [("overhead", start - since)]
        # Clipped to the wait: an event from before it explains nothing, and clocks of recorded ranks may disagree.
        come = min(max(self.known[event], since), start)
        if event >= self.graph.collectives:
            before_updates = "barrier" if event < self.graph.copies else "offload"
            cause = before_updates if event < self.graph.updates else "update"
            return [(cause, come - since), ("overhead", start - come)]
        if self.timeline.program.ranks[rank][position].kind.role is Role.SEND:
            return [("queue", come - since), ("overhead", start - come)]
        # Until the other end had it ready the rank waited for a computation, from then on for the link.
        sent = min(max(self.latest[event], since), come)
        return [("dependency", sent - since), ("communication", come - sent), ("overhead", start - come)]

    def path(self) -> tuple[Step, ...]:
        """The critical path, found from its end."""
        spans = self.timeline.spans
        ends = [(end, rank, position) for rank, row in enumerate(spans) for position, (_, end) in enumerate(row)]
        if not ends:
            return ()
        end, rank, position = max(ends, key=lambda each: each[0])
        steps: list[Step] = []
        # A makespan that ends with something in flight (a gather): the path begins with who brought it about.
        if self._op(rank, position).kind.started:
            rank, position, end = self._source(self.graph.feeds[rank][position], steps)
        while True:
            op, start = self._op(rank, position), spans[rank][position][0]
            event = self.graph.needs[rank][position]
            # Whichever came later held the operation up: the event, or the rank's own list.
            if event and self.known[event] > self._clock(rank, position):
                steps.append(Step(rank, position, op, start, end, self._edge(event, op)))
                rank, position, end = self._source(event, steps)
                continue
            # Tokens that only start something take no time and explain nothing, unless the path came in by their end.
            if not op.kind.started or end > start:
                steps.append(Step(rank, position, op, start, end, Edge.ORDER))
            if position == 0:
                break
            end, position = self._clock(rank, position), position - 1
        steps[-1] = replace(steps[-1], edge=Edge.START)
        return tuple(reversed(steps))

    def _source(self, event: int, steps: list[Step]) -> tuple[int, int, float]:
        """The operation that brought an event about and its end, after all that the event queued behind."""
        end = self.known[event]
        while True:
            rank, position = self.last[event]
            # While the lane was busy longer than the last contributor took, the event before it is to blame.
            free = self.graph.free(event, self.known)
            if free <= self.latest[event]:
                break
            steps.append(Step(rank, position, self._op(rank, position), free, end, Edge.LANE))
            event, end = self.graph.before[event], free
        started = self._op(rank, position).kind.started
        return rank, position, end if started else self.timeline.spans[rank][position][1]

    def _edge(self, event: int, op: Op) -> Edge:
        if self.graph.copies <= event < self.graph.updates:
            return Edge.COPY
        if event >= self.graph.collectives:
            return Edge.COLLECTIVE
        return Edge.QUEUE if op.kind.role is Role.SEND else Edge.TRANSFER

    def _clock(self, rank: int, position: int) -> float:
        """When the rank was through with all that comes before an operation."""
        if position == 0:
            return 0.0
        start, end = self.timeline.spans[rank][position - 1]
        return start if self._op(rank, position - 1).kind.started else end

    def _op(self, rank: int, position: int) -> Op:
        return self.timeline.program.ranks[rank][position]
