"""A rank's step, divided into parts, from its own record.

The step's thread writes one entry after the other: operations and what the trainer does between them. Inside an
operation lie waits: of a collective from its mark `waited` to its end, of a lane's job from start to end. So each
moment belongs to exactly one entry, and what belongs to none is `TimePart.OTHER`.

    operation     ├──── compute ────┤ all_gather ├──── compute ────┤
    collective         └ launched ──┤ waited ────┤
                                    ├ straggler ┤├ tp   the last rank arrived in between
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..pipeline.kind import Role
from ..pipeline.needs import KINDS, Kinds
from ..pipeline.program import Ops
from . import kinds
from .parts import (
    AT,
    AXES,
    BLIND,
    CPU,
    DURATIONS,
    LINK_RANK,
    LINK_S,
    OWN,
    PAIRS,
    QUEUED,
    SECONDS,
    STEP,
    TIME_PARTS,
    WAITS,
    TimePart,
    part_of_axis,
)
from .ring import BESIDE, DEVICE_TIME, ENTRY_BYTES, HEADER_BYTES, NAMES_BYTES, NEXT_WORD, Recorder

_SECTIONS = {
    kinds.DATA: TimePart.DATA,
    kinds.SETTLE: TimePart.OFFLOAD,
    kinds.DRAIN: TimePart.REPORT,
    kinds.REPORT: TimePart.REPORT,
    kinds.SAVE: TimePart.CHECKPOINT,
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
_TOP, _COLLECTIVE, _WAIT, _AGAIN, _GARBAGE, _COPY, _NOTHING = range(7)
_GC, _OTHER, _PP, _VOCABULARY, _BUBBLE, _STRAGGLER, _CONTENTION, _RECOMPUTE = (
    AT[part]
    for part in (
        TimePart.GC, TimePart.OTHER, TimePart.PP, TimePart.VOCABULARY, TimePart.BUBBLE, TimePart.STRAGGLER,
        TimePart.CONTENTION, TimePart.RECOMPUTE,
    )
)  # fmt: skip
_NOT_OWN = tuple(AT[part] for part in (TimePart.DATA, TimePart.CHECKPOINT, TimePart.GC, TimePart.REPORT))
_AXIS_AT = {AT[part]: index for index, part in enumerate(AXES)}
_MOST_OPEN = 1024
"""Entries whose end is awaited; more are only left behind by what failed."""


def durations_of(ops: Ops) -> tuple[tuple[str, int], ...]:
    """(token, stage) of the computing operations of a rank, the order of the durations in its row."""
    found = {(op.kind.token, op.stage): None for op in ops if op.kind.computes}
    return tuple(found)


@dataclass(frozen=True)
class _Codes:
    """What the record's codes mean: for each code of a kind its class and its part, and whether what is waited for in
    it is the end of a pipeline; for each code of an axis its part."""

    names: int
    kind: tuple[int, ...]
    part: tuple[int, ...]
    tail: tuple[bool, ...]
    axis: tuple[int, ...]

    @staticmethod
    def of(names: Sequence[str], pipelined: bool) -> _Codes:
        tails = {Kinds.NORM.token, kinds.DRAIN} if pipelined else set()
        axes = [TimePart.OFFLOAD if name == kinds.COPIES else part_of_axis(name) for name in names]
        return _Codes(
            len(names),
            tuple(_class_of(name) for name in names),
            tuple(AT[_part_of(name)] for name in names),
            tuple(name in tails for name in names),
            tuple(AT[part] for part in axes),
        )


def _class_of(name: str) -> int:
    if name in KINDS or name in _SECTIONS:
        return _TOP
    others = {kinds.WAIT: _WAIT, kinds.RECOMPUTE: _AGAIN, kinds.COLLECT: _GARBAGE, kinds.COPY: _COPY}
    return others.get(name, _NOTHING if name in ("", kinds.MEMORY, kinds.WRITE, kinds.BARRIER) else _COLLECTIVE)


def _part_of(name: str) -> TimePart:
    if name in KINDS:
        kind = KINDS[name]
        return TimePart.DP if kind in (Kinds.REDUCE, Kinds.GATHER) else _ROLES[kind.role]
    return _SECTIONS.get(name, TimePart.OTHER)


@dataclass(slots=True)
class _Top:
    """An operation, or what the trainer does between two of them, on its way into the row; times in ns."""

    start: int
    end: int
    kind: int
    op: int
    cpu: int
    waited: int = 0
    elsewhere: int = 0
    """Waits for other stages."""
    computed: int = 0
    """CPU time of its waits."""
    beside: int = 0
    """Collections of garbage."""
    again: int = 0
    """Second runs without their waits."""


class _Entry(NamedTuple):
    """What is read of an entry; the rest of `ring.ENTRY` is passed over."""

    version: int
    start: int
    end: int
    op: int
    kind: int
    axis: int
    peer: int
    flags: int
    waited: int
    arrived: int
    cpu: int


_READ = struct.Struct("=Q8xqq32xiii4xi8xiqqq8x")


class StepReader:
    """Reads a rank's own record, step after step.

    It goes through the entries one by one: that takes a rank of few entries a tenth of what arrays of them would, and
    one of thousands no longer than writing them.

    Args:
        recorder: of the rank; this process writes it.
        ops: what the rank does in a step.
        pipelined: whether there are other stages to wait for.
    """

    def __init__(self, recorder: Recorder, ops: Ops, *, pipelined: bool) -> None:
        self._recorder, self._pipelined = recorder, pipelined
        self._entries = recorder.memory[HEADER_BYTES + NAMES_BYTES :]
        self._words = recorder.memory[:HEADER_BYTES].cast("q")
        self._next = self._words[NEXT_WORD]
        self._open: list[int] = []
        self._codes = _Codes.of(recorder.names, pipelined)
        self._durations = durations_of(ops)
        places = {key: place for place, key in enumerate(self._durations)}
        self._place = tuple(places.get((op.kind.token, op.stage), -1) for op in ops)

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return DURATIONS + len(self._durations)

    def read(self, step: int, begin: int, end: int, *, pairs: float = 0.0, queued_s: float = 0.0) -> np.ndarray | None:
        """The row (`size`,) of a step; None where the ring has come round since the last one was read.

        Args:
            step: its number, from 1.
            begin, end: when it began and ended (monotonic ns).
            pairs: attention pairs of the rank's own microbatches.
            queued_s: how long its thread waited for a core.
        """
        fresh = self._fresh(end)
        if fresh is None:
            return None
        if self._recorder.known != self._codes.names:
            self._codes = _Codes.of(self._recorder.names, self._pipelined)
        on_device = self._recorder.device is not None
        row = _Division(fresh, self._codes, begin, end, on_device=on_device).row(self._place, self.size)
        row[STEP], row[PAIRS], row[QUEUED] = step, pairs, queued_s
        return np.array(row)

    def _fresh(self, until: int) -> list[_Entry] | None:
        """The entries that began before `until` and have ended since the last call; others wait for the next one."""
        first, last, capacity = self._next, self._words[NEXT_WORD], self._recorder.capacity
        self._next = last
        if last - first > capacity:
            self._open.clear()
            return None
        found, still, device = [], [], self._recorder.device
        for ticket in (*self._open, *range(first, last)):
            generation, slot = divmod(ticket, capacity)
            entry = _Entry._make(_READ.unpack_from(self._entries, slot * ENTRY_BYTES))
            if entry.version != 2 * generation + 2:
                continue
            late = (entry.waited or entry.start) >= until or (device is not None and ticket in device)
            if entry.end and not late:
                found.append(entry)
            elif late or not entry.flags & BESIDE:
                still.append(ticket)
        self._open = still[-_MOST_OPEN:]
        return found


class _Division:
    """The entries of one step on their way into its row; times in ns."""

    def __init__(self, entries: list[_Entry], codes: _Codes, begin: int, end: int, *, on_device: bool = False) -> None:
        self._codes, self._seconds = codes, (end - begin) / 1e9
        self._sections: list[_Top] = []
        """What the host does between operations, where these are timed on the device: it costs what the device idles
        meanwhile."""
        self._tops: list[_Top] = []
        self._waits: list[tuple[int, _Entry]] = []
        self._again: list[list[int]] = []
        """Start, end and waits of second runs."""
        self._garbage: list[_Entry] = []
        self._jobs: list[_Entry] = []
        """What ran beside."""
        self._copies: list[_Entry] = []
        """Long copies of parts of collectives, whichever thread made them."""
        for entry in entries:
            kind = codes.kind[entry.kind]
            if kind == _COPY and entry.start >= begin:
                self._copies.append(entry)
            elif entry.flags & BESIDE:
                self._jobs.append(entry)
            elif (entry.waited or entry.start) < begin:
                continue
            elif kind == _TOP and on_device:
                timed = entry.flags & DEVICE_TIME
                top = _Top(max(entry.start, begin), min(entry.end, end), entry.kind, entry.op, 0)
                (self._tops if timed else self._sections).append(top)
            elif kind == _TOP:
                self._tops.append(_Top(entry.start, entry.end, entry.kind, entry.op, entry.cpu))
            elif kind == _COLLECTIVE and entry.waited:
                self._waits.append((entry.waited, entry))
            elif kind == _WAIT and entry.axis:
                self._waits.append((entry.start, entry))
            elif kind == _AGAIN:
                self._again.append([entry.start, entry.end, 0])
            elif kind == _GARBAGE:
                self._garbage.append(entry)
        self._tops.sort(key=lambda top: top.start)
        self._starts = [top.start for top in self._tops]
        self._again = _outer(self._again)
        self._waits += self._copies_at_launch()
        self._parts = [0.0] * len(TIME_PARTS)

    def row(self, place: tuple[int, ...], size: int) -> list[float]:
        """See `StepReader.read`."""
        row, parts = [0.0] * size, self._parts
        for begun, entry in self._waits:
            self._wait(begun, entry, row)
        for entry in self._garbage:
            parts[_GC] += entry.end - entry.start
            if (top := self._holder(entry.start)) is not None:
                top.beside += entry.end - entry.start
        for start, end, waited in self._again:
            if (top := self._holder(start)) is not None:
                top.again += max(end - start - waited, 0)
        for top in self._tops:
            self._close(top)
        for section in self._sections:
            parts[self._codes.part[section.kind]] += self._idle(section)
        row[: len(parts)] = [part / 1e9 for part in parts]
        row[CPU] = sum(top.cpu for top in self._tops) / 1e9
        row[_OTHER] += self._seconds - sum(row[:WAITS])
        row[SECONDS] = self._seconds
        row[LINK_RANK], row[LINK_S] = self._slowest_link()
        row[OWN] = self._seconds - sum(row[WAITS:STEP]) - sum(row[part] for part in _NOT_OWN)
        self._set_durations(row, place)
        return row

    def _copies_at_launch(self) -> list[tuple[int, _Entry]]:
        """The step's own copies that lie in no wait: of what was there when this rank came to its collective."""
        if not self._copies:
            return []
        begun = sorted((start, entry.end) for start, entry in self._waits)
        found = []
        for copy in self._copies:
            at = bisect_right(begun, (copy.start, copy.end)) - 1
            if not copy.flags & BESIDE and (at < 0 or begun[at][1] <= copy.start):
                found.append((copy.start, copy))
        return found

    def _slowest_link(self) -> tuple[int, float]:
        """The rank from which copies took longest, and how long in s; -1 without any."""
        seconds: dict[int, float] = {}
        for copy in self._copies:
            seconds[copy.peer] = seconds.get(copy.peer, 0.0) + (copy.end - copy.start) / 1e9
        return max(seconds.items(), key=lambda each: each[1], default=(-1, 0.0))

    def _holder(self, moment: int) -> _Top | None:
        """What is under way at the top at a moment."""
        at = bisect_right(self._starts, moment) - 1
        return self._tops[at] if at >= 0 and moment <= self._tops[at].end else None

    def _wait(self, begun: int, entry: _Entry, row: list[float]) -> None:
        """Divides a wait into that for others and that for data on their way."""
        axis, length, top = self._codes.axis[entry.axis], entry.end - begun, self._holder(begun)
        kind = self._codes.kind[entry.kind]
        job = kind == _WAIT
        of_stages = axis == _PP or (job and axis == _VOCABULARY) or (top is not None and self._codes.tail[top.kind])
        blind = kind == _COLLECTIVE and not entry.arrived
        if job:
            for_others = self._of_job(begun, entry)
        elif blind:
            for_others = length if axis == _PP else 0
        else:  # a copy waits for nobody
            for_others = max(min(entry.arrived, entry.end) - begun, 0)
        self._parts[_BUBBLE if of_stages else _STRAGGLER] += for_others
        if blind and axis in _AXIS_AT:
            row[BLIND + _AXIS_AT[axis]] += (length - for_others) / 1e9
        else:
            self._parts[axis] += length - for_others
        if axis in _AXIS_AT:
            row[WAITS + _AXIS_AT[axis]] += length / 1e9
        if top is not None:
            top.waited += length
            top.computed += entry.cpu
            top.elsewhere += length if of_stages or axis == _VOCABULARY else 0
        if self._again:
            run = next((run for run in self._again if run[0] <= begun < run[1]), None)
            if run is not None:
                run[2] += length

    def _of_job(self, begun: int, entry: _Entry) -> int:
        """Of a wait for a lane's job: what of it its collectives waited for the last rank. Copies wait for nobody."""
        own = [job for job in self._jobs if job.axis == entry.axis and job.arrived]
        if not own:
            return 0
        moving = sum(max(min(job.end, entry.end) - max(job.arrived, begun), 0) for job in own)
        return max(entry.end - begun - moving, 0)

    def _close(self, top: _Top) -> None:
        """Gives what is left of an entry to its part."""
        own = top.end - top.start - top.waited - top.beside - top.again
        absent = max(own + top.again - max(top.cpu - top.computed, 0), 0) if top.cpu else 0
        of_again = min(max(absent - own, 0), top.again)
        self._parts[_CONTENTION] += absent
        self._parts[_RECOMPUTE] += top.again - of_again
        self._parts[self._codes.part[top.kind]] += own - absent + of_again

    def _idle(self, section: _Top) -> int:
        """What of a section of the host no operation was under way on the device."""
        covered = sum(
            max(min(top.end, section.end) - max(top.start, section.start), 0)
            for top in self._tops[max(bisect_right(self._starts, section.start) - 1, 0) :]
            if top.start < section.end
        )
        return max(section.end - section.start - covered, 0)

    def _set_durations(self, row: list[float], place: tuple[int, ...]) -> None:
        counts: dict[int, int] = {}
        for top in self._tops:
            at = place[top.op] if 0 <= top.op < len(place) else -1
            if at >= 0:
                row[DURATIONS + at] += (top.end - top.start - top.elsewhere) / 1e9
                counts[at] = counts.get(at, 0) + 1
        for at, count in counts.items():
            row[DURATIONS + at] /= count


def _outer(runs: list[list[int]]) -> list[list[int]]:
    """Second runs that lie in no other one, in order."""
    found: list[list[int]] = []
    for run in sorted(runs):
        if not found or run[1] > found[-1][1]:
            found.append(run)
    return found
