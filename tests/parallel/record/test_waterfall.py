"""A rank's step is divided into parts as a reference divides it that looks at one moment after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest

from pentad.parallel.pipeline.program import Op
from pentad.parallel.record import kinds
from pentad.parallel.record.parts import (
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
)
from pentad.parallel.record.ring import BESIDE, Recorder
from pentad.parallel.record.slots import ARRIVED, END, START, WAITED
from pentad.parallel.record.slots import CPU as CPU_TIME
from pentad.parallel.record.waterfall import StepReader, StepTimes, durations_of

OPS = tuple(map(Op.parse, ("F0@0", "F1@0", "BW0@0", "BW1@0", "RG0", "NORM", "OPT0", "AG0")))
PART_OF_OP = [*[TimePart.COMPUTE] * 4, TimePart.DP, TimePart.OPTIMIZER, TimePart.OPTIMIZER, TimePart.DP]


@dataclass
class Entry:
    """One entry, times in ns from 0."""

    kind: str
    start: int
    end: int
    axis: str = ""
    op: int = -1
    waited: int = 0
    arrived: int = 0
    cpu: int = 0
    beside: bool = False
    peer: int = -1


@dataclass
class Written:
    """A ring with entries of any times, and who reads it."""

    recorder: Recorder = field(default_factory=lambda: Recorder(None, rank=0, world=1, entries=2048))

    def write(self, *entries: Entry) -> list[int]:
        """Their tickets."""
        r, fork, tickets = self.recorder, self.recorder.fork(), []
        for entry in entries:
            writer = fork if entry.beside else r
            writer.op = entry.op
            ticket = writer.enter(r.intern(entry.kind), axis=r.intern(entry.axis), peer=entry.peer)
            self.set(ticket, entry)
            tickets.append(ticket)
        return tickets

    def set(self, ticket: int, entry: Entry) -> None:
        held = self.recorder._held[ticket]
        held[START], held[WAITED], held[ARRIVED], held[CPU_TIME] = entry.start, entry.waited, entry.arrived, entry.cpu
        held[END] = entry.end
        self.recorder.flush()


def _read(entries: list[Entry], begin: int, end: int, *, pipelined: bool = False) -> np.ndarray:
    written = Written()
    reader = StepReader(written.recorder, OPS, pipelined=pipelined)
    written.write(*entries)
    return _row(reader, 3, begin, end)


def _row(reader: StepReader, step: int, begin: int, end: int) -> np.ndarray:
    rows = reader.read([StepTimes(step, begin, end)])
    assert rows is not None
    return rows[0]


def _parts(row: np.ndarray) -> dict[TimePart, float]:
    return {part: round(row[AT[part]] * 1e9) for part in TIME_PARTS if round(row[AT[part]] * 1e9)}


def test_a_step_by_hand() -> None:
    row = _read(
        [
            Entry("F", 50, 90, op=0, cpu=40),  # of the evaluation before
            Entry(kinds.DATA, 100, 130),
            Entry("F", 140, 240, op=0, cpu=70),
            Entry("all_gather", 150, 220, "tp", 0, waited=180, arrived=200),
            Entry("BW", 240, 400, op=2, cpu=160),
            Entry(kinds.RECOMPUTE, 250, 300, op=2),
            Entry("all_gather", 260, 280, "tp", 2, waited=270, arrived=1),
            Entry("all_reduce", 390, 460, "data", 2, waited=430, arrived=455),
            Entry("RG", 400, 470, op=4, cpu=20),
            Entry(kinds.REPORT, 480, 490),
        ],
        100,
        500,
    )
    assert _parts(row) == {
        TimePart.DATA: 30,
        # 100, of which 40 waited; it ran 70
        TimePart.COMPUTE: 60 + 160 - 50,
        TimePart.STRAGGLER: 20 + 25,
        TimePart.TP: 20 + 10,
        TimePart.RECOMPUTE: 40,
        TimePart.DP: 70 - 30 + 5 - 20,
        TimePart.CONTENTION: 20,
        TimePart.REPORT: 10,
        TimePart.OTHER: 400 - 30 - 100 - 160 - 70 - 10,
    }
    assert row[SECONDS] == pytest.approx(400e-9)
    assert row[OWN] == pytest.approx((400 - 30 - 40 - 10 - 30 - 10) * 1e-9)
    assert row[CPU] == pytest.approx(250e-9)
    waits = dict(zip(AXES, row[WAITS : WAITS + len(AXES)], strict=True))
    assert waits[TimePart.TP] == pytest.approx(50e-9) and waits[TimePart.DP] == pytest.approx(30e-9)
    assert durations_of(OPS) == (("F", 0), ("BW", 0))
    assert row[DURATIONS : DURATIONS + 2] == pytest.approx([100e-9, 160e-9])
    assert row[STEP] == 3 and row[PAIRS] == 0


def test_waits_for_other_stages_are_a_bubble() -> None:
    entries = [
        Entry("F", 100, 200, op=0, cpu=50),
        Entry(kinds.WAIT, 110, 160, op=0),
        Entry("receive", 90, 159, "channel 0>1", -1, waited=111, arrived=150),
        Entry("NORM", 200, 300, op=5, cpu=10),
        Entry("all_reduce", 210, 290, "world", 5, waited=211, arrived=280),
    ]
    row = _read(entries, 80, 300, pipelined=True)
    assert _parts(row) == {
        TimePart.BUBBLE: 39 + 69, TimePart.PP: 9, TimePart.DP: 10, TimePart.COMPUTE: 50, TimePart.CONTENTION: 2 + 11,
        TimePart.OPTIMIZER: 10, TimePart.OTHER: 20,
    }  # fmt: skip
    assert row[DURATIONS] == pytest.approx(52e-9)
    alone = _parts(_read(entries, 80, 300))
    assert alone[TimePart.STRAGGLER] == 69 and alone[TimePart.BUBBLE] == 39


def test_a_lanes_job_is_looked_into() -> None:
    row = _read(
        [
            Entry("F", 100, 200, op=0, cpu=100),
            Entry("all_reduce", 90, 170, "vocab_head", 0, waited=95, arrived=150, beside=True),
            Entry(kinds.WAIT, 120, 180, "vocab_head", 0),
            Entry(kinds.WAIT, 185, 195, kinds.COPIES, 0),
        ],
        100,
        200,
        pipelined=True,
    )
    parts = _parts(row)
    assert (parts[TimePart.VOCABULARY], parts[TimePart.BUBBLE], parts[TimePart.OFFLOAD]) == (20, 40, 10)


def test_what_began_a_step_before_counts_where_it_is_waited_for() -> None:
    written = Written()
    reader = StepReader(written.recorder, OPS, pipelined=False)
    gather = Entry("all_gather", 90, 0, "data", 7)
    (ticket,) = written.write(gather)
    written.write(Entry("AG", 90, 95, op=7, cpu=5))
    first = _row(reader, 1, 0, 100)
    written.write(Entry("F", 100, 200, op=0, cpu=90))
    written.set(ticket, Entry("all_gather", 90, 130, "data", 7, waited=110, arrived=115))
    second, third = _row(reader, 2, 100, 200), _row(reader, 3, 200, 210)
    assert _parts(first) == {TimePart.DP: 5, TimePart.OTHER: 95}
    assert _parts(second) == {TimePart.COMPUTE: 80, TimePart.STRAGGLER: 5, TimePart.DP: 15}
    assert _parts(third) == {TimePart.OTHER: 10}


def test_a_ring_that_has_come_round_gives_no_row_and_the_next_step_does() -> None:
    written = Written(Recorder(None, rank=0, world=1, entries=4))
    reader = StepReader(written.recorder, OPS, pipelined=False)
    written.write(*[Entry("F", 10 * i, 10 * i + 5, op=0) for i in range(5)])
    assert reader.read([StepTimes(1, 0, 100)]) is None
    written.write(*[Entry("F", 100 + 10 * i, 105 + 10 * i, op=0, cpu=5) for i in range(4)])
    row = _row(reader, 2, 100, 200)
    assert _parts(row) == {TimePart.COMPUTE: 20, TimePart.OTHER: 80}


def test_nobody_knows_when_the_last_rank_came() -> None:
    row = _read([Entry("F", 0, 50, op=0, cpu=20), Entry("all_to_all", 5, 40, "ep", 0, waited=10)], 0, 50)
    assert row[BLIND + AXES.index(TimePart.EP)] == pytest.approx(30e-9)
    assert _parts(row) == {TimePart.COMPUTE: 20}
    assert row[: len(TIME_PARTS)].sum() + row[BLIND : BLIND + len(AXES)].sum() == pytest.approx(row[SECONDS])


def test_a_long_copy_is_communication_wherever_it_was_made() -> None:
    row = _read(
        [
            Entry("F", 0, 100, op=0, cpu=70),
            Entry("all_gather", 8, 40, "tp", 0, waited=38, arrived=9),
            Entry(kinds.COPY, 10, 30, "tp", 0, peer=1),  # of what was there when this rank came to its collective
            Entry("all_gather", 50, 90, "ep", 0, waited=55, arrived=60),
            Entry(kinds.COPY, 62, 85, "ep", 0, peer=3),  # inside the wait, which counts it
            Entry(kinds.COPY, 5, 95, "data", 0, peer=2, beside=True),  # a lane's: the step's thread went on
            Entry(kinds.COPY, -50, -10, "tp", -1, peer=5),  # of the step before
        ],
        0,
        100,
    )
    expected = {TimePart.TP: 22, TimePart.STRAGGLER: 5, TimePart.EP: 30}
    assert _parts(row) == {**expected, TimePart.COMPUTE: 43}
    assert (row[LINK_RANK], row[LINK_S]) == (2, pytest.approx(90e-9))
    clean = _read([Entry("F", 0, 100, op=0, cpu=100)], 0, 100)
    assert (clean[LINK_RANK], clean[LINK_S]) == (-1, 0)


def _random_step(draw: Random) -> Iterator[Entry]:
    """Sections and operations one after the other, with waits and second runs inside."""
    clock = 1000
    sequence = [
        (kinds.DATA, -1),
        *((op.kind.token, i) for i, op in enumerate(OPS)),
        (kinds.DRAIN, -1),
        (kinds.SAVE, -1),
    ]
    for kind, op in sequence:
        clock += draw.randrange(20)
        start, inside = clock, []
        for _ in range(draw.randrange(5) if op >= 0 else 0):
            clock += draw.randrange(30)
            waited, clock = clock, clock + draw.randrange(1, 60)
            arrived = draw.choice([1, waited, draw.randrange(waited, clock + 1), clock])
            axis = draw.choice(["tp", "cp_inner", "edp", "world", "ep", "vocab_head"])
            inside.append(Entry("all_gather", max(1, waited - 50), clock, axis, op, waited, arrived, draw.randrange(2)))
            clock += draw.randrange(30)
        clock += draw.randrange(1, 50)
        if kind == "BW" and inside and draw.random() < 0.8:
            first = inside[0]
            inside.append(Entry(kinds.RECOMPUTE, first.waited - draw.randrange(5) + 0, first.end + 1, op=op))
            inside[-1].start = max(inside[-1].start, start)
        clock += 2
        yield Entry(kind, start, clock, op=op, cpu=(clock - start) if op >= 0 else 0)
        yield from inside


def _by_moments(entries: list[Entry], begin: int, end: int) -> dict[TimePart, float]:
    """The same, one nanosecond after the other."""
    sections = {kinds.DATA: TimePart.DATA, kinds.DRAIN: TimePart.REPORT, kinds.SAVE: TimePart.CHECKPOINT}
    axes = {
        "tp": TimePart.TP,
        "cp_inner": TimePart.CP,
        "edp": TimePart.DP,
        "world": TimePart.DP,
        "ep": TimePart.EP,
        "vocab_head": TimePart.VOCABULARY,
    }
    found: dict[TimePart, float] = {}
    for now in range(begin, end):
        part = TimePart.OTHER
        for entry in entries:  # later ones lie inside earlier ones
            from_ = entry.waited or entry.start
            if not from_ <= now < entry.end:
                continue
            if entry.axis:
                part = TimePart.STRAGGLER if now < entry.arrived else axes[entry.axis]
                break
            if entry.kind == kinds.RECOMPUTE:
                part = TimePart.RECOMPUTE
            else:
                part = sections.get(entry.kind) or PART_OF_OP[entry.op]
        found[part] = found.get(part, 0) + 1
    return found


@pytest.mark.parametrize("seed", range(8))
def test_any_step_as_one_moment_after_the_other(seed: int) -> None:
    entries = list(_random_step(Random(seed)))
    # Waits before second runs, so that the reference finds a wait inside a second run first.
    ordered = sorted(entries, key=lambda e: (bool(e.axis), e.kind == kinds.RECOMPUTE))
    begin, end = 990, max(entry.end for entry in entries) + 17
    row = _read(entries, begin, end)
    assert _parts(row) == _by_moments(ordered, begin, end)
    assert row[: len(TIME_PARTS)].sum() == pytest.approx((end - begin) * 1e-9)


def _any_step(draw: Random, clock: int) -> list[Entry]:
    """The same from a time on, with copies and collections of garbage, and collectives of which less is known."""
    found = []
    for entry in _random_step(draw):
        entry.arrived = 0 if draw.random() < 0.2 else entry.arrived
        entry.kind = "all_to_all" if entry.kind == "all_gather" and draw.random() < 0.2 else entry.kind
        entry.cpu = draw.randrange(2 * (entry.end - entry.start) + 1) if draw.random() < 0.7 else 0
        if entry.axis and draw.random() < 0.4:
            length = draw.randrange(1, 40)
            start = draw.choice([entry.waited, draw.randrange(entry.waited, entry.end), entry.end])
            found.append(Entry(kinds.COPY, start, start + length, entry.axis, entry.op, peer=draw.randrange(3)))
            found[-1].beside = draw.random() < 0.2
        if draw.random() < 0.1:
            found.append(Entry(kinds.COLLECT, draw.randrange(entry.start, entry.end), entry.end, op=entry.op))
        found.append(entry)
    for entry in found:
        entry.start, entry.end = entry.start + clock, entry.end + clock
        entry.waited = entry.waited + clock if entry.waited else 0
        entry.arrived = entry.arrived + clock if entry.arrived > 1 else entry.arrived
    return found


@pytest.mark.parametrize("pipelined", (False, True))
@pytest.mark.parametrize("seed", range(6))
def test_many_steps_at_once_as_one_after_the_other(seed: int, pipelined: bool) -> None:
    draw, clock, steps, each = Random(seed), 0, [], []
    for number in range(8):
        entries = _any_step(draw, clock)
        end = max(entry.end for entry in entries) + 5
        steps.append(StepTimes(number, clock + draw.randrange(900), end, number))
        each.append(entries)
        clock = end + draw.randrange(50)
    together, alone = Written(), Written()
    reader = StepReader(together.recorder, OPS, pipelined=pipelined)
    for entries in each:
        together.write(*entries)
    rows = reader.read(steps, queued_s=2.0)
    assert rows is not None and rows.shape == (8, reader.size)
    assert rows[:, QUEUED].sum() == pytest.approx(2.0)
    one = StepReader(alone.recorder, OPS, pipelined=pipelined)
    for step, entries, row in zip(steps, each, rows, strict=True):
        alone.write(*entries)
        expected = one.read([step], queued_s=row[QUEUED])
        assert expected is not None
        np.testing.assert_array_equal(row, expected[0])


def test_names_that_are_no_communication() -> None:
    row = _read(
        [
            Entry("F", 0, 40, op=0, cpu=40),
            Entry(kinds.MEMORY, 10, 10, op=0),
            Entry(kinds.COLLECT, 20, 30),
            Entry("all_gather", 5, 25, "dp", beside=True),
        ],
        0,
        40,
    )
    assert _parts(row) == {TimePart.COMPUTE: 30, TimePart.GC: 10}
    assert BESIDE
