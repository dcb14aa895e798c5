"""A rank's step, divided into parts, from its own record.

The step's thread writes one entry after the other: operations and what the trainer does between them. Inside an
operation lie waits: of a collective from its mark `waited` to its end, of a lane's job from start to end. So each
moment belongs to exactly one entry, and what belongs to none is `TimePart.OTHER`.

    operation     ├──── compute ────┤ all_gather ├──── compute ────┤
    collective         └ launched ──┤ waited ────┤
                                    ├ straggler ┤├ tp   the last rank arrived in between
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from .reader import ON_FILE
from .ring import BESIDE, HEADER_BYTES, NAMES_BYTES, NEXT_WORD, Recorder

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
_TOP, _COLLECTIVE, _WAIT, _AGAIN, _GARBAGE, _NOTHING = range(6)
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
    kind: np.ndarray
    part: np.ndarray
    tail: np.ndarray
    axis: np.ndarray

    @staticmethod
    def of(names: Sequence[str], pipelined: bool) -> _Codes:
        tails = {Kinds.NORM.token, kinds.DRAIN} if pipelined else set()
        axes = [TimePart.OFFLOAD if name == kinds.COPIES else part_of_axis(name) for name in names]
        return _Codes(
            len(names),
            np.array([_class_of(name) for name in names]),
            np.array([AT[_part_of(name)] for name in names]),
            np.array([name in tails for name in names]),
            np.array([AT[part] for part in axes]),
        )


def _class_of(name: str) -> int:
    if name in KINDS or name in _SECTIONS:
        return _TOP
    others = {kinds.WAIT: _WAIT, kinds.RECOMPUTE: _AGAIN, kinds.COLLECT: _GARBAGE}
    return others.get(name, _NOTHING if name in ("", kinds.MEMORY, kinds.WRITE, kinds.BARRIER) else _COLLECTIVE)


def _part_of(name: str) -> TimePart:
    if name in KINDS:
        kind = KINDS[name]
        return TimePart.DP if kind in (Kinds.REDUCE, Kinds.GATHER) else _ROLES[kind.role]
    return _SECTIONS.get(name, TimePart.OTHER)


class StepReader:
    """Reads a rank's own record, step after step.

    Args:
        recorder: of the rank; this process writes it.
        ops: what the rank does in a step.
        pipelined: whether there are other stages to wait for.
    """

    def __init__(self, recorder: Recorder, ops: Ops, *, pipelined: bool) -> None:
        self._recorder, self._pipelined = recorder, pipelined
        entries = recorder.memory[HEADER_BYTES + NAMES_BYTES :]
        self._entries = np.frombuffer(entries, ON_FILE, recorder.capacity)
        self._next = self._written
        self._open: list[int] = []
        self._codes = _Codes.of(recorder.names, pipelined)
        self._durations = durations_of(ops)
        places = {key: place for place, key in enumerate(self._durations)}
        self._place = np.array([places.get((op.kind.token, op.stage), -1) for op in ops], np.int64)

    @property
    def _written(self) -> int:
        return self._recorder.memory[8 * NEXT_WORD : 8 * NEXT_WORD + 8].cast("q")[0]

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
        fresh = self._fresh()
        if fresh is None:
            return None
        if len(self._recorder.names) != self._codes.names:
            self._codes = _Codes.of(self._recorder.names, self._pipelined)
        row = _Division(fresh, self._codes, begin, end).row(self._place, len(self._durations))
        row[STEP], row[PAIRS], row[QUEUED] = step, pairs, queued_s
        return row

    def _fresh(self) -> np.ndarray | None:
        """The entries since the last call, and those that were open then."""
        first, last, capacity = self._next, self._written, self._recorder.capacity
        self._next = last
        if last - first > capacity:
            self._open.clear()
            return None
        tickets = np.arange(first, last)
        if self._open:
            tickets = np.concatenate((self._open, tickets))
        generations, slots = np.divmod(tickets, capacity)
        entries = self._entries[slots]
        kept = entries["version"] == (2 * generations + 2).astype(np.uint64)
        entries, tickets = entries[kept], tickets[kept]
        under_way = (entries["end"] == 0) & (entries["flags"] & BESIDE == 0)
        self._open = tickets[under_way][-_MOST_OPEN:].tolist() if under_way.any() else []
        return entries[entries["end"] > 0]


class _Division:
    """The entries of one step on their way into its row; times in ns."""

    def __init__(self, entries: np.ndarray, codes: _Codes, begin: int, end: int) -> None:
        self._codes, self._seconds = codes, (end - begin) / 1e9
        beside = entries["flags"] & BESIDE != 0
        begun = np.where(entries["waited"] > 0, entries["waited"], entries["start"])
        mine = ~beside & (begun >= begin)
        self._beside = entries[beside] if beside.any() else entries[:0]
        entries = entries[mine]
        kind = codes.kind[entries["kind"]]
        self._top = entries[kind == _TOP]
        self._starts, self._ends = self._top["start"].astype(np.int64), self._top["end"].astype(np.int64)
        waits = ((kind == _COLLECTIVE) & (entries["waited"] > 0)) | ((kind == _WAIT) & (entries["axis"] > 0))
        self._waits, self._jobs = entries[waits], kind[waits] == _WAIT
        self._again, self._garbage = entries[kind == _AGAIN], entries[kind == _GARBAGE]
        self._parts = np.zeros(len(TIME_PARTS))

    def row(self, place: np.ndarray, durations: int) -> np.ndarray:
        """See `StepReader.read`."""
        row = np.zeros(DURATIONS + durations)
        count, axes = len(self._top), slice(BLIND, BLIND + len(AXES))
        waited, computed, elsewhere = np.zeros(count), np.zeros(count), np.zeros(count)
        if len(self._waits):
            waited, computed, elsewhere = self._divide_waits(row)
        own = self._ends - self._starts - waited
        own -= self._inside(self._garbage, count, TimePart.GC)
        again = self._remade(count)
        own -= again
        cpu = self._top["cpu"]
        absent = np.where(cpu > 0, np.clip(own + again - np.maximum(cpu - computed, 0), 0, None), 0.0)
        of_again = np.clip(absent - own, 0, again)
        self._add(TimePart.CONTENTION, absent.sum())
        self._add(TimePart.RECOMPUTE, (again - of_again).sum())
        self._parts += np.bincount(self._codes.part[self._top["kind"]], own - absent + of_again, len(TIME_PARTS))
        row[: len(TIME_PARTS)] = self._parts / 1e9
        row[AT[TimePart.OTHER]] += self._seconds - row[: len(TIME_PARTS)].sum() - row[axes].sum()
        row[SECONDS], row[CPU] = self._seconds, float(cpu.sum()) / 1e9
        excluded = [AT[part] for part in (TimePart.DATA, TimePart.CHECKPOINT, TimePart.GC, TimePart.REPORT)]
        row[OWN] = self._seconds - row[WAITS : WAITS + len(AXES)].sum() - row[excluded].sum()
        self._set_durations(row, place, elsewhere)
        return row

    def _add(self, part: TimePart, ns: float) -> None:
        self._parts[AT[part]] += ns

    def _divide_waits(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each entry at the top: its waits, the CPU time of them, and the waits for other stages."""
        waits, codes = self._waits, self._codes
        begun = np.where(self._jobs, waits["start"], waits["waited"])
        length, arrived = waits["end"] - begun, waits["arrived"]
        axis = codes.axis[waits["axis"]]
        blind = ~self._jobs & (arrived == 0)
        for_others = np.clip(np.minimum(arrived, waits["end"]) - begun, 0, None)
        if self._jobs.any():
            self._look_into_lanes(begun, for_others)
        at, inside = self._holders(begun)
        of_stages = axis == AT[TimePart.PP]
        if len(self._top):
            of_stages = of_stages | (codes.tail[self._top["kind"][at]] & inside)
        of_stages |= self._jobs & (axis == AT[TimePart.VOCABULARY])
        for_others = np.where(blind, np.where(axis == AT[TimePart.PP], length, 0), for_others)
        moving = length - for_others
        self._add(TimePart.BUBBLE, for_others[of_stages].sum())
        self._add(TimePart.STRAGGLER, for_others[~of_stages].sum())
        self._parts += np.bincount(axis, np.where(blind, 0, moving), len(TIME_PARTS))
        for sums, weights in ((BLIND, np.where(blind, moving, 0)), (WAITS, length)):
            by_part = np.bincount(axis, weights, len(TIME_PARTS))
            row[sums : sums + len(AXES)] = by_part[[AT[each] for each in AXES]] / 1e9
        count = len(self._top)
        pipe = of_stages | (axis == AT[TimePart.VOCABULARY])
        weights = (length, waits["cpu"], np.where(pipe, length, 0))
        return tuple(np.bincount(at[inside], each[inside], count) for each in weights)  # type: ignore[return-value]

    def _look_into_lanes(self, begun: np.ndarray, for_others: np.ndarray) -> None:
        """Of a wait for a lane's job: what of it its collectives waited for the last rank. Copies wait for nobody."""
        waits, lanes = self._waits, self._beside
        for index in np.flatnonzero(self._jobs):
            own = lanes[(lanes["axis"] == waits["axis"][index]) & (lanes["arrived"] > 0)]
            start, end = max(begun[index], 0), waits["end"][index]
            moving = np.clip(np.minimum(own["end"], end) - np.maximum(own["arrived"], start), 0, None).sum()
            for_others[index] = max(end - start - moving, 0) if len(own) else 0

    def _holders(self, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entry at the top that is under way at each moment, and whether there is one."""
        at = np.searchsorted(self._starts, moments, "right") - 1
        inside = at >= 0
        at = np.maximum(at, 0)
        if len(self._starts):
            inside &= moments <= self._ends[at]
        return at, inside & bool(len(self._starts))

    def _inside(self, entries: np.ndarray, count: int, part: TimePart) -> np.ndarray | float:
        """What entries inside others take of them, and adds it to a part."""
        if not len(entries):
            return 0.0
        length = entries["end"] - entries["start"]
        self._add(part, length.sum())
        at, inside = self._holders(entries["start"].astype(np.int64))
        return np.bincount(at[inside], length[inside], count)

    def _remade(self, count: int) -> np.ndarray | float:
        """What second runs take of the entries at the top, without their waits. One may lie inside another."""
        again = self._again[np.argsort(self._again["start"], kind="stable")]
        if not len(again):
            return 0.0
        ends = again["end"].astype(np.int64)
        again = again[np.concatenate(([True], ends[1:] > np.maximum.accumulate(ends)[:-1]))]
        starts, ends = again["start"].astype(np.int64), again["end"].astype(np.int64)
        length = (ends - starts).astype(np.float64)
        if len(self._waits):
            begun = np.where(self._jobs, self._waits["start"], self._waits["waited"])
            run = np.searchsorted(starts, begun, "right") - 1
            inside = (run >= 0) & (begun < ends[run])
            length -= np.bincount(run[inside], (self._waits["end"] - begun)[inside], len(again))
        at, inside = self._holders(starts)
        return np.bincount(at[inside], length[inside], count)

    def _set_durations(self, row: np.ndarray, place: np.ndarray, elsewhere: np.ndarray) -> None:
        op = self._top["op"]
        computes = (op >= 0) & (op < len(place))
        where = np.where(computes, place[np.where(computes, op, 0)] if len(place) else -1, -1)
        kept, count = where >= 0, len(row) - DURATIONS
        if count and kept.any():
            total = np.bincount(where[kept], (self._ends - self._starts - elsewhere)[kept], count)
            row[DURATIONS:] = total / np.maximum(np.bincount(where[kept], minlength=count), 1) / 1e9
