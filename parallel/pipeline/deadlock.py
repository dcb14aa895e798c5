"""Whether a program can finish, found without times; where it cannot, the smallest cycle of ranks that wait.

What an operation waits for is always that other ranks have passed certain places of their lists: a send, the receive
two sends back on its channel, or a collective's token on every rank. So the answer depends on neither times nor luck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from .communication import Key, Relation, Row, awaited, channel, is_lowered, places, producer
from .kind import Kind, Role
from .program import OUTSTANDING_SENDS, Op, Program


@dataclass(frozen=True)
class Waits:
    """What each operation waits for. Operations of all ranks are numbered through; groups follow.

    Args:
        starts: the number of each rank's first operation, and their total.
        on: the operations and groups that an operation waits for, where there are any.
        groups: the operations that must all have passed.
    """

    starts: tuple[int, ...]
    on: dict[int, list[int]]
    groups: list[list[int]]

    def place(self, number: int) -> tuple[int, int]:
        """(rank, position) of an operation."""
        rank = next(r for r in range(len(self.starts) - 1) if number < self.starts[r + 1])
        return rank, number - self.starts[rank]


@dataclass(frozen=True)
class Run:
    """How far a program comes: the operations in an order in which they can run, and each rank's next position."""

    order: list[int]
    reached: list[int]

    def finished(self, program: Program) -> bool:
        return all(at == len(ops) for at, ops in zip(self.reached, program.ranks, strict=True))


def waits(program: Program, rendezvous: bool = True) -> Waits:
    """What each operation of a complete program waits for beyond its own list.

    Args:
        rendezvous: a send is complete only when its receive was posted; otherwise at once.
    """
    starts = [0]
    numbers: list[dict[Key, int]] = []
    for ops in program.ranks:
        numbers.append(places(ops, starts[-1]))
        starts.append(starts[-1] + len(ops))
    on: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    known: dict[Key, int] = {}
    members = _Members(program, numbers)
    wanted = Relation(lambda op: (awaited(program, op),) if op.kind.computes else ())
    for first, ops in zip(starts, program.ranks if len(program.ranks) > 1 else (), strict=False):
        for number, op in enumerate(ops, first):
            for kind, stage in wanted[op.kind, op.stage]:
                target = kind, op.index, stage
                event = known.get(target)
                if event is None:
                    found = members.of(target)
                    event = known[target] = found[0] if len(found) == 1 else starts[-1] + len(groups)
                    if len(found) > 1:
                        groups.append(found)
                on[number] = [event]
    if rendezvous:
        _add_rendezvous(program, starts, on)
    return Waits(tuple(starts), on, groups)


class _Members:
    """The operations that stand for a send or collective: its tokens, or their producers in a compute-only program."""

    def __init__(self, program: Program, numbers: list[dict[Key, int]]) -> None:
        self._program, self._numbers, self._lowered = program, numbers, is_lowered(program)
        self._rows: dict[Row, list[tuple[int, Row]]] = {}

    def of(self, target: Key) -> list[int]:
        kind, index, stage = target
        rows = self._rows.get((kind, stage))
        if rows is None:
            rows = self._rows[kind, stage] = [*self._found(kind, stage)]
        return [self._numbers[rank][made, index, at] for rank, (made, at) in rows]

    def _found(self, kind: Kind, stage: int) -> Iterator[tuple[int, Row]]:
        program = self._program
        for rank in range(len(program.ranks)) if kind.lane else (program.placement[stage],):
            made = (kind, 0, stage) if self._lowered else producer(program, Op(kind, 0, stage), rank)
            if made is not None:
                yield rank, (made[0], made[2])


def _add_rendezvous(program: Program, starts: list[int], on: dict[int, list[int]]) -> None:
    """Adds that a send waits for the receive of the send before the last on its channel."""
    sends: dict[tuple[int, int], list[int]] = {}
    receives: dict[tuple[int, int], list[int]] = {}
    for rank, ops in enumerate(program.ranks):
        for k, op in enumerate(ops):
            if op.kind.role is Role.SEND:
                sends.setdefault(channel(op, rank, program), []).append(starts[rank] + k)
            elif op.kind.role is Role.RECEIVE:
                receives.setdefault(channel(op, rank, program), []).append(starts[rank] + k)
    for where, numbers in sends.items():
        for later, receive in zip(numbers[OUTSTANDING_SENDS:], receives.get(where, ()), strict=False):
            on.setdefault(later, []).append(receive)


def run_in_order(program: Program, graph: Waits) -> Run:
    """Passes operations in order on every rank until nothing moves."""
    starts, total, on = graph.starts, graph.starts[-1], graph.on
    passed = bytearray(total + len(graph.groups))
    missing = [len(members) for members in graph.groups]
    group_of: dict[int, list[int]] = {}
    for group, members in enumerate(graph.groups):
        for member in members:
            group_of.setdefault(member, []).append(group)
    waiting: dict[int, list[int]] = {}
    reached = [0] * len(program.ranks)
    order: list[int] = []
    ready = deque(range(len(program.ranks)))
    while ready:
        rank = ready.popleft()
        for number in range(starts[rank] + reached[rank], starts[rank + 1]):
            unmet = None
            for event in on.get(number, ()):
                if not passed[event]:
                    unmet = event
                    break
            if unmet is not None:
                waiting.setdefault(unmet, []).append(rank)
                break
            passed[number] = 1
            order.append(number)
            reached[rank] += 1
            if number in waiting:
                ready.extend(waiting.pop(number))
            for group in group_of.get(number, ()):
                missing[group] -= 1
                if not missing[group]:
                    passed[total + group] = 1
                    ready.extend(waiting.pop(total + group, ()))
    return Run(order, reached)


def deadlock(program: Program) -> str | None:
    """None if a complete program finishes however its sends behave; else its smallest blocking cycle in words."""
    graph = waits(program)
    result = run_in_order(program, graph)
    if result.finished(program):
        return None
    eager = waits(program, rendezvous=False)
    eager_result = run_in_order(program, eager)
    if eager_result.finished(program):
        head = "deadlock where a send is complete only when its receive is posted"
        return f"{head}: {_cycle(program, graph, result)}"
    return f"deadlock: {_cycle(program, eager, eager_result)}"


def blocked(graph: Waits, result: Run) -> Iterator[tuple[int, int, int, int]]:
    """What stopped ranks wait for: (rank, position, rank awaited, position that it has not passed)."""
    starts, total = graph.starts, graph.starts[-1]

    def is_passed(number: int) -> bool:
        rank, position = graph.place(number)
        return position < result.reached[rank]

    for rank, at in enumerate(result.reached):
        if at == starts[rank + 1] - starts[rank]:
            continue
        for event in graph.on.get(starts[rank] + at, ()):
            for number in graph.groups[event - total] if event >= total else (event,):
                if not is_passed(number):
                    yield rank, at, *graph.place(number)


def _cycle(program: Program, graph: Waits, result: Run) -> str:
    edges: dict[int, dict[int, tuple[int, int]]] = {}
    for rank, at, other, position in blocked(graph, result):
        edges.setdefault(rank, {}).setdefault(other, (at, position))
    best: list[int] = []
    for start in sorted(edges):
        cycle = _shortest(edges, start)
        if cycle and (not best or len(cycle) < len(best)):
            best = cycle
    links = zip(best, [*best[1:], *best[:1]], strict=True)
    return "; ".join(_words(program, rank, *edges[rank][other], other) for rank, other in links)


def _shortest(edges: dict[int, dict[int, tuple[int, int]]], start: int) -> list[int]:
    """The ranks of a shortest cycle through `start`, beginning with it; empty if there is none."""
    before = {start: start}
    queue = deque([start])
    while queue:
        rank = queue.popleft()
        for other in sorted(edges.get(rank, ())):
            if other == start:
                path = [rank]
                while path[-1] != start:
                    path.append(before[path[-1]])
                return path[::-1]
            if other not in before:
                before[other] = rank
                queue.append(other)
    return []


def _words(program: Program, rank: int, at: int, position: int, other: int) -> str:
    waiter, op = program.ranks[rank][at], program.ranks[other][position]
    what = op.kind.awaited.format(rank=other, place=f"{op} (operation {position})", sends=OUTSTANDING_SENDS)
    return f"rank {rank} at {waiter} (operation {at}) waits for {what}"
