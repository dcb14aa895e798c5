"""A rank's step, divided into parts, from its own record: one entry after the other.

The step's thread writes one entry after the other: operations and what the trainer does between them. Inside an
operation lie waits: of a collective from its mark `waited` to its end, of a lane's job from start to end. So each
moment belongs to exactly one entry, and what belongs to none is `TimePart.OTHER`.

    operation     ├──── compute ────┤ all_gather ├──── compute ────┤
    collective         └ launched ──┤ waited ────┤
                                    ├ straggler ┤├ tp   the last rank arrived in between
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..pipeline.kind import Role
from ..pipeline.needs import KINDS, Kinds
from . import kinds
from .parts import (
    AT,
    AXES,
    BLIND,
    DURATIONS,
    LINK_RANK,
    LINK_S,
    NOT_OWN,
    OWN,
    SECONDS,
    STEP,
    TIME_PARTS,
    WAITS,
    TimePart,
    part_of_axis,
)
from .parts import CPU as CPU_S
from .ring import BESIDE, DEVICE_TIME
from .slots import ARRIVED, AXIS, CPU, END, FLAGS, KIND, OP, PEER, START, WAITED

_SECTIONS = {
    kinds.DATA: TimePart.DATA,
    kinds.SETTLE: TimePart.OFFLOAD,
    kinds.DRAIN: TimePart.REPORT,
    kinds.REPORT: TimePart.REPORT,
    kinds.SAVE: TimePart.CHECKPOINT,
    kinds.SNAPSHOT: TimePart.SNAPSHOT,
    kinds.EVALUATE: TimePart.OTHER,
}
_ROLES = {
    Role.COMPUTE: TimePart.COMPUTE,
    Role.SEND: TimePart.PP,
    Role.RECEIVE: TimePart.PP,
    Role.COLLECTIVE: TimePart.VOCABULARY,
    Role.COPY: TimePart.OFFLOAD,
    Role.MEMORY: TimePart.OFFLOAD,
    Role.UPDATE: TimePart.OPTIMIZER,
}
_OF_REPLICAS = (
    *(Kinds.REDUCE, Kinds.GATHER),
    *(Kinds.COLLECT_FORWARD, Kinds.HAVE_FORWARD, Kinds.DROP_FORWARD),
    *(Kinds.COLLECT_BACKWARD, Kinds.HAVE_BACKWARD, Kinds.DROP_BACKWARD),
)
"""What data parallelism is the reason for, whatever it occupies."""


class EntryClass:
    """What an entry is."""

    TOP, COLLECTIVE, WAIT, AGAIN, GARBAGE, COPY, NOTHING = range(7)


@dataclass(frozen=True)
class Codes:
    """What the record's codes mean: for each code of a kind its class and its part, and whether what is waited for in
    it is the end of a pipeline; for each code of an axis its part."""

    names: int
    kind: tuple[int, ...]
    part: tuple[int, ...]
    tail: tuple[bool, ...]
    axis: tuple[int, ...]

    @staticmethod
    def of(names: Sequence[str], pipelined: bool) -> Codes:
        tails = {Kinds.NORM.token, kinds.DRAIN} if pipelined else set()
        axes = [TimePart.OFFLOAD if name == kinds.COPIES else part_of_axis(name) for name in names]
        return Codes(
            len(names),
            tuple(_class_of(name) for name in names),
            tuple(AT[_part_of(name)] for name in names),
            tuple(name in tails for name in names),
            tuple(AT[part] for part in axes),
        )


def _class_of(name: str) -> int:
    if name in KINDS or name in _SECTIONS:
        return EntryClass.TOP
    others = {
        kinds.WAIT: EntryClass.WAIT,
        kinds.RECOMPUTE: EntryClass.AGAIN,
        kinds.COLLECT: EntryClass.GARBAGE,
        kinds.COPY: EntryClass.COPY,
    }
    return others.get(
        name, EntryClass.NOTHING if name in ("", kinds.MEMORY, kinds.WRITE, kinds.BARRIER) else EntryClass.COLLECTIVE
    )


def _part_of(name: str) -> TimePart:
    if name in KINDS:
        kind = KINDS[name]
        return TimePart.DP if kind in _OF_REPLICAS else _ROLES[kind.role]
    return _SECTIONS.get(name, TimePart.OTHER)


_TOP, _COLLECTIVE, _WAIT, _AGAIN = EntryClass.TOP, EntryClass.COLLECTIVE, EntryClass.WAIT, EntryClass.AGAIN
_GARBAGE, _COPY = EntryClass.GARBAGE, EntryClass.COPY
_GC, _OTHER, _PP, _VOCABULARY, _BUBBLE, _STRAGGLER, _CONTENTION, _RECOMPUTE = (
    AT[part]
    for part in (
        TimePart.GC, TimePart.OTHER, TimePart.PP, TimePart.VOCABULARY, TimePart.BUBBLE, TimePart.STRAGGLER,
        TimePart.CONTENTION, TimePart.RECOMPUTE,
    )
)  # fmt: skip
_AXIS_AT = {AT[part]: index for index, part in enumerate(AXES)}


# Of an operation, or what the trainer does between two of them, on its way into the row; times in ns. Its waits for
# other stages are in ELSEWHERE, the CPU time of its waits in COMPUTED; LEFT is its length without waits, collections of
# garbage and second runs, which are in REMADE without their waits.
_START, _END, _KIND, _OP, _CPU, _LEFT, _ELSEWHERE, _COMPUTED, _REMADE = range(9)
Held = Sequence[int]
"""An entry as `slots.HeldEntries` has it."""


class Division:
    """The entries of one step on their way into its row; times in ns.

    It is made of lists and plain numbers: a rank does this after every step, with cold caches.

    Args:
        entries: all ended.
        codes: what they mean.
        begin, end: when the step began and ended.
        on_device: whether operations are timed on the device.
    """

    def __init__(self, entries: Iterable[Held], codes: Codes, begin: int, end: int, *, on_device: bool = False) -> None:
        self._codes, self._seconds = codes, (end - begin) / 1e9
        self._sections: list[list[int]] = []
        """What the host does between operations, where these are timed on the device: it costs what the device idles
        meanwhile."""
        self._tops: list[list[int]] = []
        self._waits: list[tuple[int, Held]] = []
        self._again: list[list[int]] = []
        """Start, end and waits of second runs."""
        self._garbage: list[Held] = []
        self._jobs: list[Held] = []
        """What ran beside."""
        self._copies: list[Held] = []
        """Long copies of parts of collectives, whichever thread made them."""
        kinds, tops, waits = codes.kind, self._tops, self._waits
        for entry in entries:
            kind = kinds[entry[KIND]]
            if kind == _TOP and not on_device and not entry[FLAGS] & BESIDE:
                if (start := entry[START]) >= begin:
                    length = entry[END] - start
                    tops.append([start, entry[END], entry[KIND], entry[OP], entry[CPU], length, 0, 0, 0])
            elif kind == _COPY and entry[START] >= begin:
                self._copies.append(entry)
            elif entry[FLAGS] & BESIDE:
                self._jobs.append(entry)
            elif (entry[WAITED] or entry[START]) < begin:
                continue
            elif kind == _COLLECTIVE:
                if entry[WAITED]:
                    waits.append((entry[WAITED], entry))
            elif kind == _TOP:
                start, stop = max(entry[START], begin), min(entry[END], end)
                timed = entry[FLAGS] & DEVICE_TIME
                top = [start, stop, entry[KIND], entry[OP], 0, stop - start, 0, 0, 0]
                (tops if timed else self._sections).append(top)
            elif kind == _WAIT and entry[AXIS]:
                waits.append((entry[START], entry))
            elif kind == _AGAIN:
                self._again.append([entry[START], entry[END], 0])
            elif kind == _GARBAGE:
                self._garbage.append(entry)
        tops.sort()
        self._starts = [top[_START] for top in tops]
        if self._again:
            self._again = _outer(self._again)
        if self._copies:
            waits += self._copies_at_launch()
        self._parts = [0.0] * len(TIME_PARTS)

    def row(self, place: Sequence[int], size: int) -> list[float]:
        """The row (`size`,), without what is known from elsewhere.

        Args:
            place: where the duration of each operation goes in it; -1: nowhere.
        """
        row, parts = [0.0] * size, self._parts
        for begun, entry in self._waits:
            self._wait(begun, entry, row)
        for entry in self._garbage:
            length = entry[END] - entry[START]
            parts[_GC] += length
            if (top := self._holder(entry[START])) is not None:
                top[_LEFT] -= length
        for start, end, waited in self._again:
            if (top := self._holder(start)) is not None:
                again = max(end - start - waited, 0)
                top[_REMADE] += again
                top[_LEFT] -= again
        computed = self._close(row, place)
        for section in self._sections:
            parts[self._codes.part[section[_KIND]]] += self._idle(section)
        row[: len(parts)] = [part / 1e9 for part in parts]
        row[CPU_S] = computed / 1e9
        row[_OTHER] += self._seconds - sum(row[:WAITS])
        row[SECONDS] = self._seconds
        row[LINK_RANK], row[LINK_S] = self._slowest_link()
        row[OWN] = self._seconds - sum(row[WAITS:STEP]) - sum(row[part] for part in NOT_OWN)
        return row

    def _copies_at_launch(self) -> list[tuple[int, Held]]:
        """The step's own copies that lie in no wait: of what was there when this rank came to its collective."""
        begun = sorted((start, entry[END]) for start, entry in self._waits)
        found = []
        for copy in self._copies:
            at = bisect_right(begun, (copy[START], copy[END])) - 1
            if not copy[FLAGS] & BESIDE and (at < 0 or begun[at][1] <= copy[START]):
                found.append((copy[START], copy))
        return found

    def _slowest_link(self) -> tuple[int, float]:
        """The rank from which copies took longest, and how long in s; -1 without any."""
        seconds: dict[int, float] = {}
        for copy in self._copies:
            seconds[copy[PEER]] = seconds.get(copy[PEER], 0.0) + (copy[END] - copy[START]) / 1e9
        return max(seconds.items(), key=lambda each: each[1], default=(-1, 0.0))

    def _holder(self, moment: int) -> list[int] | None:
        """What is under way at the top at a moment."""
        at = bisect_right(self._starts, moment) - 1
        return self._tops[at] if at >= 0 and moment <= self._tops[at][_END] else None

    def _wait(self, begun: int, entry: Held, row: list[float]) -> None:
        """Divides a wait into that for others and that for data on their way."""
        axis, length, top = self._codes.axis[entry[AXIS]], entry[END] - begun, self._holder(begun)
        kind = self._codes.kind[entry[KIND]]
        job = kind == _WAIT
        of_stages = axis == _PP or (job and axis == _VOCABULARY) or (top is not None and self._codes.tail[top[_KIND]])
        blind = kind == _COLLECTIVE and not entry[ARRIVED]
        if job:
            for_others = self._of_job(begun, entry)
        elif blind:
            for_others = length if axis == _PP else 0
        else:  # a copy waits for nobody
            for_others = max(min(entry[ARRIVED], entry[END]) - begun, 0)
        self._parts[_BUBBLE if of_stages else _STRAGGLER] += for_others
        at = _AXIS_AT.get(axis)
        if blind and at is not None:
            row[BLIND + at] += (length - for_others) / 1e9
        else:
            self._parts[axis] += length - for_others
        if at is not None:
            row[WAITS + at] += length / 1e9
        if top is not None:
            top[_LEFT] -= length
            top[_COMPUTED] += entry[CPU]
            if of_stages or axis == _VOCABULARY:
                top[_ELSEWHERE] += length
        if self._again:
            run = next((run for run in self._again if run[0] <= begun < run[1]), None)
            if run is not None:
                run[2] += length

    def _of_job(self, begun: int, entry: Held) -> int:
        """Of a wait for a lane's job: what of it its collectives waited for the last rank. Copies wait for nobody."""
        own = [job for job in self._jobs if job[AXIS] == entry[AXIS] and job[ARRIVED]]
        if not own:
            return 0
        moving = sum(max(min(job[END], entry[END]) - max(job[ARRIVED], begun), 0) for job in own)
        return max(entry[END] - begun - moving, 0)

    def _close(self, row: list[float], place: Sequence[int]) -> int:
        """Gives what is left of each entry at the top to its part, and the mean durations to the row; the CPU time of
        all."""
        parts, part_of, total, counts = self._parts, self._codes.part, 0, {}
        for start, end, kind, op, cpu, left, elsewhere, computed, again in self._tops:
            absent = of_again = 0
            if cpu:
                total += cpu
                absent = max(left + again - max(cpu - computed, 0), 0)
                of_again = min(max(absent - left, 0), again)
                parts[_CONTENTION] += absent
            parts[_RECOMPUTE] += again - of_again
            parts[part_of[kind]] += left - absent + of_again
            at = place[op] if 0 <= op < len(place) else -1
            if at >= 0:
                row[DURATIONS + at] += (end - start - elsewhere) / 1e9
                counts[at] = counts.get(at, 0) + 1
        for at, count in counts.items():
            row[DURATIONS + at] /= count
        return total

    def _idle(self, section: list[int]) -> int:
        """What of a section of the host no operation was under way on the device."""
        begin, end = section[_START], section[_END]
        covered = sum(
            max(min(top[_END], end) - max(top[_START], begin), 0)
            for top in self._tops[max(bisect_right(self._starts, begin) - 1, 0) :]
            if top[_START] < end
        )
        return max(end - begin - covered, 0)


def _outer(runs: list[list[int]]) -> list[list[int]]:
    """Second runs that lie in no other one, in order."""
    found: list[list[int]] = []
    for run in sorted(runs):
        if not found or run[1] > found[-1][1]:
            found.append(run)
    return found
