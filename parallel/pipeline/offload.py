"""Activation offload as a pass: which activations leave the device, and where in each list they go and come back.

What a stage keeps of a microbatch is needed again only when its backward pass comes. In between it may lie on the host,
at the price of two copies beside the compute (Wan et al., PipeOffload, 2025). The pass puts five operations into a
program that is otherwise complete, all of them of the rank's own, so that no order between ranks changes:

    F3@0 OFF3@0 … REL3@0 … PRE3@0 RLD3@0 … RES3@0 B3@0

OFF and RLD start copies, REL and RES wait for them, REL and PRE give memory back and take it again. A copy engine does
one copy after the other, so copies to the host take the first time that is free after their forward pass, copies back
the last one that ends early enough for their backward pass.

What the host cannot hold goes on to a disk, in the same way: STO follows REL, DRP gives the slab back, GET takes one
again, GOT waits for the disk and PRE follows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from .check import ProgramError, check_program
from .communication import is_training, number_slots
from .kind import Kind
from .memory import ActivationBytes, peak_bytes
from .needs import Kinds
from .program import Op, Program
from .refine import part_stages
from .simulate import Timeline, simulate
from .times import Times

Pass = tuple[int, int]
"""(stage, microbatch)"""

_COPIES = 3
"""An activation stays where its window is not longer than this many times both copies: they could not be hidden."""

_AS_FAST = 1.005
"""How much longer a step may be for offloads that are to cost nothing."""

_FINE = 32
"""Parts of a number of activations to which it is searched."""


@dataclass(frozen=True)
class Window:
    """The time in which an activation is not needed.

    Args:
        pass_: of which stage and microbatch.
        start: the end of its forward pass.
        end: the start of its backward pass.
        margin: how long that takes: a copy back should end so much earlier.
    """

    pass_: Pass
    start: float
    end: float
    margin: float

    @property
    def length(self) -> float:
        return self.end - self.start


def windows(program: Program, times: Times) -> list[list[Window]]:
    """The windows of each rank's activations when the program runs in these times, longest first.

    Raises:
        ValueError: the program has no backward passes.
    """
    return _windows(simulate(program, times))


def _windows(timeline: Timeline) -> list[list[Window]]:
    if not is_training(timeline.program):
        raise ValueError("an evaluation keeps nothing that could be offloaded")
    found: list[list[Window]] = []
    for ops, spans in zip(timeline.program.ranks, timeline.spans, strict=True):
        ends = {(op.stage, op.index): end for op, (_, end) in zip(ops, spans, strict=True) if op.kind is Kinds.FORWARD}
        mine = [
            Window((op.stage, op.index), ends[op.stage, op.index], start, end - start)
            for op, (start, end) in zip(ops, spans, strict=True)
            if _is_backward(op.kind)
        ]
        # Of equally long ones the lower stage: it is the one that a schedule keeps longer as a rule.
        found.append(sorted(mine, key=lambda window: (-window.length, window.pass_)))
    return found


def worthwhile(program: Program, times: Times) -> list[list[Pass]]:
    """The activations of each rank whose copies fit into their windows with room to spare, longest-lived first."""
    return [
        [w.pass_ for w in mine if w.length - w.margin > _COPIES * sum(_copies(w.pass_, times))]
        for mine in windows(program, times)
    ]


def selective(program: Program, times: Times, sizes: ActivationBytes, always: Collection[Pass] = ()) -> list[Pass]:
    """The activations whose offload lowers the highest peak of all ranks and costs no time.

    Of those that are worthwhile the ones with the shortest windows are left out until the simulated step is at most
    0.5 % longer than without offload. Of the rest each rank offloads the longest-lived, and no more of them than bring
    its peak to the lowest that the rank with the highest can reach: further ones would be copied for nothing.

    Args:
        program: of a training step, complete; of one rank or lowered.
        times: of its passes and of the copies.
        sizes: of the activations.
        always: what is offloaded anyway, and counts for the step and the peaks that are compared with.
    """
    plain, taken = simulate(program, times), set(always)
    long = {window.pass_: window.length for mine in _windows(plain) for window in mine}
    chosen = [[pass_ for pass_ in mine if pass_ not in taken] for mine in worthwhile(program, times)]
    ranked = sorted((pass_ for mine in chosen for pass_ in mine), key=lambda pass_: (-long[pass_], pass_))

    def offloaded(passes: Iterable[Pass]) -> Program:
        return _with_offloads(plain, {*taken, *passes})

    within = simulate(offloaded(()), times).makespan * _AS_FAST

    def is_as_fast(passes: Collection[Pass]) -> bool:
        return simulate(offloaded(passes), times).makespan <= within

    fast = frozenset(ranked[: _most(lambda count: is_as_fast(ranked[:count]), len(ranked))])
    mine = [[pass_ for pass_ in row if pass_ in fast] for row in chosen]

    def peaks(counts: Sequence[int]) -> tuple[float, ...]:
        passes = (pass_ for row, count in zip(mine, counts, strict=True) for pass_ in row[:count])
        return peak_bytes(offloaded(passes), sizes)

    enough = max(peaks([len(row) for row in mine])) * (1 + 1e-9)
    # All ranks at once: where the operations of one stand does not depend on what another offloads.
    low, high = [0] * len(mine), [len(row) for row in mine]
    while low != high:
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        for rank, peak in enumerate(peaks(middle)):
            if low[rank] < high[rank]:
                low[rank], high[rank] = (low[rank], middle[rank]) if peak <= enough else (middle[rank] + 1, high[rank])
    least = [pass_ for row, count in zip(mine, high, strict=True) for pass_ in row[:count]]
    return least if is_as_fast(least) else list(fast)


def _most(holds: Callable[[int], bool], count: int) -> int:
    """The most of 0 to `count` for which it holds, to a thirty-second; it holds for 0."""
    if holds(count):
        return count
    low, high = 0, _FINE
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle * count // _FINE) else (low, middle)
    return low * count // _FINE


def first_chunks(program: Program, share: float, parts: Sequence[int] | None = None) -> list[Pass]:
    """The activations of each rank's first chunks, which live longest: up to this share of its chunks, rounded up.

    Args:
        program: of a training step.
        share: 0 to 1.
        parts: part-stages of each chunk where the program is refined.
    """
    chunks = part_stages(parts or (1,) * program.stages)
    mine = [[stages for stages in chunks if program.placement[stages[0]] == rank] for rank in range(len(program.ranks))]
    most = ceil(share * max(map(len, mine)))
    return [
        (stage, index)
        for held in mine
        for stages in held[:most]
        for stage in stages
        for index in range(program.microbatches)
    ]


def offload(program: Program, chosen: Collection[Pass], times: Times, *, stored: Collection[Pass] = ()) -> Program:
    """The program with these activations on the host while they are not needed.

    Args:
        program: of a training step, complete; of one rank or lowered.
        chosen: what is offloaded.
        times: what the places in the lists are chosen for.
        stored: those of them that go on to the disk.

    Raises:
        ProgramError: an activation is not of this program, or it has offloads already.
    """
    if any(op.kind is Kinds.OFFLOAD for ops in program.ranks for op in ops):
        raise ProgramError("the program has offloads already")
    result = _with_offloads(simulate(program, times), chosen, stored)
    check_program(result)
    return result


def _with_offloads(plain: Timeline, chosen: Collection[Pass], stored: Collection[Pass] = ()) -> Program:
    program = plain.program
    known = {window.pass_: window for mine in _windows(plain) for window in mine}
    unknown = sorted(set(chosen) - known.keys())
    if unknown:
        stage, index = unknown[0]
        raise ProgramError(f"there is no activation of microbatch {index} at stage {stage} to offload")
    wanted, ranks = set(chosen), []
    for rank, ops in enumerate(program.ranks):
        mine = [known[op.stage, op.index] for op in ops if _is_backward(op.kind) and (op.stage, op.index) in wanted]
        inserted = _Places(ops, plain.spans[rank], plain.times).all(mine, set(stored))
        out = tuple(each for k, op in enumerate(ops) for each in (*inserted[k].before, op, *inserted[k].after))
        ranks.append(number_slots(out, training=True))
    return replace(program, ranks=tuple(ranks))


def _is_backward(kind: Kind) -> bool:
    return kind in (Kinds.INPUT_GRAD, Kinds.BACKWARD)


def _copies(pass_: Pass, times: Times) -> tuple[float, float]:
    stage, index = pass_
    return times.latency(Op(Kinds.OFFLOAD, index, stage), 0), times.latency(Op(Kinds.RELOAD, index, stage), 0)


class _Engine:
    """When a copy engine is busy."""

    def __init__(self) -> None:
        self._busy: list[tuple[float, float]] = []

    def earliest(self, after: float, length: float) -> float:
        """Takes the first free time that begins at `after` or later; returns its start."""
        start = after
        for begun, ended in self._busy[max(0, bisect_left(self._busy, (after, after)) - 1) :]:
            if begun - start >= length:
                break
            start = max(start, ended)
        insort(self._busy, (start, start + length))
        return start

    def latest(self, before: float, length: float) -> float:
        """Takes the last free time that ends at `before` or earlier; returns its start."""
        end = before
        for begun, ended in reversed(self._busy[: bisect_right(self._busy, (before, before))]):
            if end - ended >= length:
                break
            end = min(end, begun)
        insort(self._busy, (end - length, end))
        return end - length


@dataclass
class _Inserted:
    """What is put around an operation of a rank's list."""

    before: list[Op]
    after: list[Op]


class _Places:
    """Where the operations of a rank's offloads stand in its list.

    Args:
        ops: the rank's list.
        spans: when they run without offload.
        times: of the copies.
    """

    def __init__(self, ops: tuple[Op, ...], spans: tuple[tuple[float, float], ...], times: Times) -> None:
        self.ops, self.starts, self.times = ops, [start for start, _ in spans], times
        self.at = {(op.stage, op.index, op.kind): k for k, op in enumerate(ops)}

    def all(self, mine: list[Window], stored: set[Pass]) -> list[_Inserted]:
        """The operations to insert, by position.

        Args:
            mine: the windows of what is offloaded, in the order of their backward passes.
            stored: what of it goes to the disk.
        """
        out = _Engine()
        back = out if self.times.one_engine else _Engine()
        gone = {
            w.pass_: out.earliest(w.start, self._copies(w)[0]) + self._copies(w)[0]
            for w in sorted(mine, key=lambda w: w.start)
        }
        come: dict[Pass, float] = {}
        for window in reversed(mine):
            come[window.pass_] = back.latest(window.end - window.margin, self._copies(window)[1])
        inserted = [_Inserted([], []) for _ in self.ops]
        returns = []
        for window in mine:
            released, backward = self._put_out(window, gone[window.pass_], window.pass_ in stored, inserted)
            returns.append((window.pass_, released, self._running(come[window.pass_]), backward))
        if stored:
            since = self._put_on_disk([w for w in mine if w.pass_ in stored], gone, come, returns, inserted)
            returns = [(each, since.get(each, released), wish, end) for each, released, wish, end in returns]
        self._put_back(returns, stored, inserted)
        return inserted

    def _copies(self, window: Window) -> tuple[float, float]:
        return _copies(window.pass_, self.times)

    def _put_on_disk(
        self,
        mine: list[Window],
        gone: dict[Pass, float],
        come: dict[Pass, float],
        returns: list[tuple[Pass, int, int, int]],
        inserted: list[_Inserted],
    ) -> dict[Pass, int]:
        """DRP where the disk has it, GET so that the host has it again in time; the positions of GET."""
        store, get = _Engine(), _Engine()
        released = {each: (at, end) for each, at, _, end in returns}
        written, wanted = {}, {}
        for window in sorted(mine, key=lambda w: gone[w.pass_]):
            length = self._latency(Kinds.STORE, window.pass_)
            written[window.pass_] = store.earliest(gone[window.pass_], length) + length
        for window in reversed(mine):
            wanted[window.pass_] = get.latest(come[window.pass_], self._latency(Kinds.FETCH, window.pass_))
        fetched = {}
        for each in written:
            at, end = released[each]
            stage, index = each
            dropped = min(max(bisect_left(self.starts, written[each]), at), end)
            inserted[dropped].before.append(Op(Kinds.DROP, index, stage))
            fetched[each] = min(max(self._running(wanted[each]), dropped), end)
        for stage, index in sorted(fetched, key=lambda each: (fetched[each], wanted[each])):
            inserted[fetched[stage, index]].before.append(Op(Kinds.FETCH, index, stage))
        return fetched

    def _latency(self, kind: Kind, pass_: Pass) -> float:
        stage, index = pass_
        return self.times.latency(Op(kind, index, stage), 0)

    def _put_out(self, window: Window, gone: float, stored: bool, inserted: list[_Inserted]) -> tuple[int, int]:
        """OFF behind its forward pass, REL where the copy has ended; returns the positions of REL and of B."""
        stage, index = window.pass_
        forward = self.at[stage, index, Kinds.FORWARD]
        found = self.at.get((stage, index, Kinds.INPUT_GRAD))
        backward = self.at[stage, index, Kinds.BACKWARD] if found is None else found
        inserted[forward].after.append(Op(Kinds.OFFLOAD, index, stage))
        released = min(max(bisect_left(self.starts, gone), forward + 1), backward)
        inserted[released].before.append(Op(Kinds.RELEASE, index, stage))
        if stored:
            inserted[released].before.append(Op(Kinds.STORE, index, stage))
        return released, backward

    def _put_back(
        self, returns: list[tuple[Pass, int, int, int]], stored: set[Pass], inserted: list[_Inserted]
    ) -> None:
        """PRE and RLD between REL (or GET) and RES, which stands before B; of each their positions and the wish."""
        # An engine copies in the order of the list, so what is needed first should come first.
        order: list[tuple[int, int, Pass]] = []
        latest = len(self.ops)
        for number, (pass_, released, wanted, backward) in reversed(list(enumerate(returns))):
            latest = min(latest, wanted, backward)
            order.append((max(latest, released), number, pass_))
        for at, _, (stage, index) in sorted(order):
            inserted[at].before += [Op(Kinds.FETCHED, index, stage)] * ((stage, index) in stored)
            inserted[at].before += [Op(Kinds.PREPARE, index, stage), Op(Kinds.RELOAD, index, stage)]
        for (stage, index), _, _, backward in returns:
            inserted[backward].before.append(Op(Kinds.RESUME, index, stage))

    def _running(self, instant: float) -> int:
        """The operation before which a copy must be started to run from an instant on: the one that runs then."""
        return max(0, bisect_right(self.starts, instant) - 1)
