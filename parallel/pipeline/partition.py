"""Which layers each stage holds: consecutive ones, so that the busiest rank has as little work as possible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

_KEPT = 128
"""Partial splits kept per stage, at least, while searching uneven costs over several chunks."""
_EXTENDED = 1 << 17
"""Partial splits that such a search extends in all, by a layer each: small models keep more of them per stage."""

MOST_EVEN = 64
"""Splits of equal worth that are listed at most."""
_TRIED = 1 << 14
"""Partial splits that are looked at for them."""

Counts = tuple[int, ...]
_Worth = tuple[int, int, int, int]
"""Largest rank, largest stage, sum of squares over ranks, sum of squares over stages: smaller is better, in order."""


def partition(
    costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0, placement: Sequence[int]
) -> Counts:
    """Number of layers of each stage.

    The layers stay in order. What is minimised, in this order: the largest cost of a rank (the sum over its stages),
    the largest cost of a stage, and unevenness (sums of squares, over ranks, then over stages). Stages may be empty.

    One stage per rank, or layers of equal cost: exact, by dynamic programming and by filling. Uneven layers over
    several chunks: exact as long as no stage has more distinct partial splits that could still win than are kept
    (thousands for 8 layers, 128 for the largest models); beyond that the best of a beam and of moving layers between
    neighbouring stages.

    Args:
        costs: of the layers, in any one unit.
        stages: how many.
        first: cost of what the first stage computes beside its layers (the embedding).
        last: cost of what the last stage computes beside its layers (the head and the loss).
        placement: the rank that holds each stage.

    Raises:
        ValueError: a cost is negative or not finite, or placement does not have one rank per stage.
    """
    if stages < 1 or len(placement) != stages:
        raise ValueError(f"{len(placement)} ranks placed for {stages} stages: one is needed for each of at least 1")
    given = (*costs, first, last)
    if not all(0 <= cost < float("inf") for cost in given):
        raise ValueError(f"costs must be at least 0 and finite, got {list(given)}")
    whole = _whole(given)
    task = _Task.of(whole[:-2], whole[-2], whole[-1], placement)
    if len(set(placement)) == stages:
        return _one_per_rank(task)
    if len(set(whole[:-2])) <= 1:
        return _equal(task, whole[0] if costs else 0)
    return _uneven(task)


def as_even(
    costs: Sequence[float], counts: Counts, *, first: float = 0.0, last: float = 0.0, placement: Sequence[int]
) -> list[Counts]:
    """All splits that are as good as `counts` in all that `partition` minimises, that one first: where layers are
    alike and do not divide evenly, the fuller stages can be any of them.

    Args:
        costs, first, last, placement: as of `partition`.
        counts: what it found.

    Returns:
        At most `MOST_EVEN` of them, from the first `_TRIED` partial splits.
    """
    whole = _whole((*costs, first, last))
    task = _Task.of(whole[:-2], whole[-2], whole[-1], placement)
    best = task.worth(counts)
    found, tried = [counts], 0
    open_ones: list[Counts] = [()]
    while open_ones and len(found) < MOST_EVEN and tried < _TRIED:
        begun, tried = open_ones.pop(), tried + 1
        if len(begun) == len(placement):
            if begun != counts and task.worth(begun) == best:
                found.append(begun)
            continue
        taken = sum(begun)
        ends = range(taken, task.layers + 1) if len(begun) + 1 < len(placement) else (task.layers,)
        open_ones += (more for end in ends if task.reaches(more := (*begun, end - taken), best))
    return found


def _whole(costs: Sequence[float]) -> list[int]:
    """The costs in a unit of which each is a multiple: sums of floats would make equal splits differ."""
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    denominator = max(below for _, below in ratios)  # all are powers of two
    return [above * (denominator // below) for above, below in ratios]


@dataclass(frozen=True)
class _Task:
    """Sums of the first k layers, what each stage costs without layers, and the rank of each stage."""

    sums: tuple[int, ...]
    beside: tuple[int, ...]
    placement: tuple[int, ...]

    @staticmethod
    def of(costs: Iterable[int], first: int, last: int, placement: Sequence[int]) -> _Task:
        beside = [0] * len(placement)
        beside[0] += first
        beside[-1] += last
        return _Task(tuple(accumulate(costs, initial=0)), tuple(beside), tuple(placement))

    @property
    def layers(self) -> int:
        return len(self.sums) - 1

    def stage_costs(self, counts: Counts) -> list[int]:
        ends = list(accumulate(counts))
        return [
            self.sums[end] - self.sums[end - count] + beside
            for end, count, beside in zip(ends, counts, self.beside, strict=False)
        ]

    def reaches(self, begun: Counts, best: _Worth) -> bool:
        """Whether the first stages leave open that the whole is as good as `best`."""
        done, ranks = self.stage_costs(begun), [0] * (max(self.placement) + 1)
        for rank, cost in zip(self.placement, done, strict=False):
            ranks[rank] += cost
        left = len(self.placement) - len(begun)
        rest = self.sums[-1] - self.sums[sum(begun)] + sum(self.beside[len(begun) :])
        squares = sum(cost * cost for cost in done)  # those of the rest are least when they are equal
        return (
            max(ranks) <= best[0]
            and max(done) <= best[1]
            and (squares - best[3]) * max(left, 1) + rest * rest * (left > 0) <= 0
        )

    def worth(self, counts: Counts) -> _Worth:
        stages = self.stage_costs(counts)
        ranks = [0] * (max(self.placement) + 1)
        for rank, cost in zip(self.placement, stages, strict=True):
            ranks[rank] += cost
        return max(ranks), max(stages), sum(r * r for r in ranks), sum(s * s for s in stages)


def _one_per_rank(task: _Task) -> Counts:
    """The most even of the splits with the smallest largest stage; of equal ones, fewer layers in early stages.

    Early stages hold the activations of more microbatches.
    """
    limit = _smallest_limit(task)
    layers, sums = task.layers, task.sums
    # least[i]: the smallest sum of squares of the stages from the current one on, when i layers are before it.
    least: list[int | None] = [None] * layers + [0]
    table = [least]
    for beside in reversed(task.beside):
        following: list[int | None] = least
        least = [None for _ in range(layers + 1)]
        for i in range(layers, -1, -1):
            for j in range(i, layers + 1):
                cost = sums[j] - sums[i] + beside
                if cost > limit:
                    break
                rest, best = following[j], least[i]
                if rest is not None and (best is None or cost * cost + rest < best):
                    least[i] = cost * cost + rest
        table.append(least)
    table.reverse()
    counts, i = [], 0
    for stage, beside in enumerate(task.beside):
        for j in range(i, layers + 1):
            cost, rest = sums[j] - sums[i] + beside, table[stage + 1][j]
            if cost <= limit and rest is not None and cost * cost + rest == table[stage][i]:
                counts.append(j - i)
                i = j
                break
    return tuple(counts)


def _smallest_limit(task: _Task) -> int:
    """The smallest cost that no stage has to exceed: binary search, filling each stage up to the limit."""

    def fits(limit: int) -> bool:
        i = 0
        for beside in task.beside:
            if beside > limit:
                return False
            start = task.sums[i]
            while i < task.layers and task.sums[i + 1] - start + beside <= limit:
                i += 1
        return i == task.layers

    low, high = -1, task.sums[-1] + sum(task.beside)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _equal(task: _Task, cost: int) -> Counts:
    """Layers of one cost: only how many each stage gets matters.

    The two limits first; then layer by layer to the rank, and in it to the stage, with the least work and room. As the
    squares grow with every layer, that is also the least sum of squares.
    """
    if cost == 0:
        return (0,) * (len(task.placement) - 1) + (task.layers,)
    stages, ranks = range(len(task.placement)), range(max(task.placement) + 1)
    members = [[s for s in stages if task.placement[s] == rank] for rank in ranks]
    beside = [sum(task.beside[s] for s in mine) for mine in members]

    def fits(rank_limit: int, stage_limit: int) -> bool:
        if max(beside) > rank_limit or max(task.beside) > stage_limit:
            return False
        each = [(stage_limit - extra) // cost for extra in task.beside]
        most = [min((rank_limit - beside[r]) // cost, sum(each[s] for s in members[r])) for r in ranks]
        return sum(most) >= task.layers

    highest = sum(task.beside) + task.layers * cost
    rank_limit = min(limit for limit in _limits(beside, task.layers, cost) if fits(limit, highest))
    stage_limit = min(limit for limit in _limits(task.beside, task.layers, cost) if fits(rank_limit, limit))
    loads, costs = list(beside), list(task.beside)
    counts = [0] * len(stages)
    for _ in range(task.layers):
        free = [s for s in stages if loads[task.placement[s]] + cost <= rank_limit and costs[s] + cost <= stage_limit]
        # Of equal ones the last: early stages hold the activations of more microbatches.
        stage = min(free, key=lambda s: (loads[task.placement[s]], costs[s], -s))
        loads[task.placement[stage]] += cost
        costs[stage] += cost
        counts[stage] += 1
    return tuple(counts)


def _limits(beside: Iterable[int], layers: int, cost: int) -> set[int]:
    return {base + k * cost for base in beside for k in range(layers + 1)}


def _uneven(task: _Task) -> Counts:
    """The best of a beam search, and of moving layers, from the split that is best for equal layers of the same sum."""
    mean = task.sums[-1] // max(task.layers, 1)
    equal = _Task((*range(0, mean * task.layers + 1, mean),) if mean else task.sums, task.beside, task.placement)
    found = _moved(task, _equal(equal, mean))
    searched = _beam(task, task.worth(found))
    if searched is not None:
        searched = _moved(task, searched)
        found = min(found, searched, key=task.worth)
    return found


def _moved(task: _Task, counts: Counts) -> Counts:
    """Moves layers between neighbouring stages, or along the stages between two of them, while that helps."""
    worth = task.worth(counts)
    while True:
        moves = []
        for source in range(len(counts)):
            for target in range(len(counts)):
                if counts[source] and source != target:
                    moved = list(counts)
                    moved[source] -= 1
                    moved[target] += 1
                    moves.append(tuple(moved))
        best = min(moves, key=task.worth, default=counts)
        if task.worth(best) >= worth:
            return counts
        counts, worth = best, task.worth(best)


_State = tuple[int, tuple[int, ...], int]
"""Layers taken, cost of each rank, largest stage."""


def _beam(task: _Task, known: _Worth) -> Counts | None:
    """The best split that a search stage by stage finds, if any is as good as the known one.

    Partial splits of one state differ only in the sum of squares of their stages, so the most even one is kept. Where
    too many states are left, those stay that can still become the most even.
    """
    most = max(_KEPT, _EXTENDED // (task.layers * len(task.placement)))
    states: dict[_State, tuple[int, Counts]] = {(0, (0,) * (max(task.placement) + 1), 0): (0, ())}
    for stage in range(len(task.placement)):
        states = _extended(task, stage, states, known[0])
        if len(states) > most:
            left = len(task.placement) - 1 - stage
            rough = {
                state: squares + (task.sums[-1] - task.sums[state[0]]) ** 2 / max(left, 1)
                for state, (squares, _) in states.items()
            }
            states = {state: states[state] for state in sorted(rough, key=rough.__getitem__)[:most]}
    return min((counts for _, counts in states.values()), key=task.worth, default=None)


def _extended(
    task: _Task, stage: int, states: dict[_State, tuple[int, Counts]], limit: int
) -> dict[_State, tuple[int, Counts]]:
    """The states after one more stage from which no rank has to exceed the limit."""
    rank, beside, total = task.placement[stage], task.beside[stage], task.sums[-1]
    following = set(task.placement[stage + 1 :])
    after: dict[_State, tuple[int, Counts]] = {}
    for (taken, loads, largest), (squares, counts) in states.items():
        room = sum(limit - loads[r] for r in following)
        for end in range(taken, task.layers + 1) if following else (task.layers,):
            cost = task.sums[end] - task.sums[taken] + beside
            if loads[rank] + cost > limit:
                break
            if room - (cost if rank in following else 0) < total - task.sums[end]:
                continue
            state = (end, (*loads[:rank], loads[rank] + cost, *loads[rank + 1 :]), max(largest, cost))
            value = (squares + cost * cost, (*counts, end - taken))
            if state not in after or value < after[state]:
                after[state] = value
    return after
