"""The simulator: when every operation of a program runs, given how long each takes.

A rank runs its list in order. A compute operation starts when what it needs has arrived; transfers and collectives are
only started by their token and run beside the compute. A transfer runs when its send and its receive were both posted,
first in first out on each directed channel, which is a link of its own, and a send waits while two are under way there.
A collective runs when it is at the head of its lane on all ranks. Whether a program comes to its end does not depend on
the times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter

from .events import ALWAYS, NEVER, Graph, build_graph
from .program import Op, Program
from .times import Times

Spans = tuple[tuple[tuple[float, float], ...], ...]

Curve = tuple[tuple[float, float], ...]
"""(time, amount from then on), in the order of time."""


@dataclass(frozen=True)
class Timeline:
    """Start and end of every operation: `spans[rank][k]` belongs to `program.ranks[rank][k]`.

    An operation that is only started (sends, receives, collectives, NORM, AG) spans from its token to its completion.

    Args:
        times: what was simulated; readings of a recorded timeline tell with them how much of a wait was communication.
        held: bytes on each rank's device over time, where they are known.
    """

    program: Program
    spans: Spans
    times: Times = field(default_factory=Times)
    held: tuple[Curve, ...] = ()

    @property
    def makespan(self) -> float:
        """From 0 to the end of the last operation."""
        return max((max(map(itemgetter(1), spans)) for spans in self.spans if spans), default=0.0)


@dataclass(frozen=True)
class Stuck:
    """An operation that cannot start, or cannot complete.

    Args:
        awaits: (rank, operation) that did not run and that it waits for; empty where nothing would help it.
        misplaced: it belongs to another rank, or what it takes from this rank does not come before it.
    """

    rank: int
    position: int
    op: Op
    awaits: tuple[tuple[int, Op], ...] = ()
    misplaced: bool = False

    def __str__(self) -> str:
        at = f"rank {self.rank} stands at {self.op} (operation {self.position}) and waits for"
        if self.awaits:
            return f"{at} {' and '.join(f'{op} of rank {rank}' for rank, op in self.awaits)}"
        if self.misplaced:
            return f"{at} what this rank does not do before"
        return f"{at} what no rank does"


class StuckError(RuntimeError):
    """The program cannot run to its end: operations wait for each other, or for what no rank does.

    Args:
        waiting: the operation at which each rank that did not come to its end stands.
    """

    def __init__(self, message: str, waiting: tuple[Stuck, ...] = ()) -> None:
        super().__init__(message)
        self.waiting = waiting


def simulate(program: Program, times: Times) -> Timeline:
    """Runs each rank's list in order, every operation as early as its needs allow.

    A lowered program runs as it stands; in one of compute only, transfers and collectives are implied and take their
    latency from when the last of their parts was computed.

    Raises:
        StuckError: the program cannot run to its end.
        UserError: the times are for another number of stages or ranks.
    """
    graph = build_graph(program, times)
    if graph.disorder:
        raise StuckError(graph.disorder)
    starts, known = _run(graph)
    stuck = _stuck(program, graph, starts, known)
    if stuck:
        raise StuckError("; ".join(str(each) for each in stuck), stuck)
    spans = []
    for begun, durations, feeds, ops in zip(starts, graph.durations, graph.feeds, program.ranks, strict=True):
        ends = [start + duration for start, duration in zip(begun, durations, strict=True)]
        for position, (op, event) in enumerate(zip(ops, feeds, strict=True)):
            if event and op.kind.started:
                ends[position] = known[event]
        spans.append(tuple(zip(begun, ends, strict=True)))
    return Timeline(program, tuple(spans), times)


def _run(graph: Graph) -> tuple[list[list[float]], list[float]]:
    """When each operation starts, per rank as far as it came, and when each event comes (-1: never)."""
    known = [-1.0] * len(graph.contributors)
    known[ALWAYS] = 0.0
    latest = [0.0] * len(known)
    missing = list(graph.contributors)
    latency, before = graph.latency, graph.before
    ranks = list(zip(graph.needs, graph.feeds, graph.durations, strict=True))
    starts: list[list[float]] = [[] for _ in ranks]
    clocks = [0.0] * len(ranks)
    waiting: dict[int, list[int]] = {}
    ready = list(range(len(ranks)))
    while ready:
        rank = ready.pop()
        needs, feeds, durations = ranks[rank]
        begun, clock = starts[rank], clocks[rank]
        for position in range(len(begun), len(needs)):
            arrival = known[needs[position]]
            if arrival < 0:
                waiting.setdefault(needs[position], []).append(rank)
                break
            if arrival > clock:
                clock = arrival
            begun.append(clock)
            clock += durations[position]
            event = feeds[position]
            if event:
                if clock > latest[event]:
                    latest[event] = clock
                missing[event] -= 1
                if not missing[event]:
                    come = latest[event]
                    if event in before:
                        come = max(come, graph.free(event, known))
                    known[event] = come + latency[event]
                    if event in waiting:
                        ready += waiting.pop(event)
        clocks[rank] = clock
    return starts, known


def _stuck(program: Program, graph: Graph, starts: list[list[float]], known: list[float]) -> tuple[Stuck, ...]:
    stopped = [(rank, len(begun)) for rank, begun in enumerate(starts) if len(begun) < len(program.ranks[rank])]
    events = [graph.needs[rank][position] for rank, position in stopped]
    if not stopped:
        # All ran, but something that was started does not complete.
        stopped, events = _incomplete(program, graph, known)
        if not stopped:
            return ()
    wanted: dict[int, list[tuple[int, Op]]] = {event: [] for event in events}
    for rank, begun in enumerate(starts):
        for position in range(len(begun), len(program.ranks[rank])):
            event = graph.feeds[rank][position]
            if event in wanted:
                wanted[event].append((rank, program.ranks[rank][position]))
    return tuple(
        Stuck(rank, position, program.ranks[rank][position], tuple(wanted[event]), event == NEVER)
        for (rank, position), event in zip(stopped, events, strict=True)
    )


def _incomplete(program: Program, graph: Graph, known: list[float]) -> tuple[list[tuple[int, int]], list[int]]:
    """The first operation of each rank that was started and never completes, with its event."""
    places, events = [], []
    for rank, (feeds, ops) in enumerate(zip(graph.feeds, program.ranks, strict=True)):
        for position, event in enumerate(feeds):
            if known[event] < 0 and ops[position].kind.started:
                places.append((rank, position))
                events.append(event)
                break
    return places, events
