"""Times of a device come into the record by events, tried with a device that is made of a queue and a clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from pentad.parallel.pipeline.execute import execute
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op
from pentad.parallel.record import kinds
from pentad.parallel.record.device_clock import DeviceClock
from pentad.parallel.record.parts import AT, AXES, BLIND, TIME_PARTS, TimePart
from pentad.parallel.record.reader import ON_FILE
from pentad.parallel.record.ring import DEVICE_TIME, HEADER_BYTES, NAMES_BYTES, Recorder
from pentad.parallel.record.waterfall import StepReader, StepTimes

OPS = tuple(map(Op.parse, ("F0@0", "BW0@0", "NORM")))


@dataclass
class Device:
    """Does what is enqueued one after the other; both clocks in ns, the device's ahead by `offset` and too fast."""

    now: int = 1_000_000
    free: int = 0
    drift: float = 1.0
    events: int = 0
    passed: dict[int, int] = field(default_factory=dict)

    def enqueue(self, length: int) -> None:
        """Work of so many ns on the device's clock."""
        self.free = max(self.free, self.now) + length

    def wait_until(self, when: int) -> None:
        """The stream waits for something that is there then."""
        self.free = max(self.free, self.now, when)

    def make(self) -> Event:
        self.events += 1
        return Event(self)


@dataclass
class Event:
    device: Device
    at: int = -1

    def record(self) -> None:
        self.at = max(self.device.free, self.device.now)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other: Event) -> float:  # type: ignore[override]
        assert self.query() and other.query()
        return (other.at - self.at) * self.device.drift / 1e6


class Rank:
    """A host that runs ahead of its device."""

    def __init__(self, drift: float = 1.0) -> None:
        self.device = Device(drift=drift)
        self.recorder = Recorder(None, rank=0, world=1, entries=256)
        self.clock = DeviceClock(self.device.make, lambda: self.device.now)  # type: ignore[arg-type]
        self.recorder.device = self.clock
        self.reader = StepReader(self.recorder, OPS, pipelined=False)
        self.tp, self.gather = self.recorder.intern("tp"), self.recorder.intern("all_gather")

    def forward(self, op: Op) -> None:
        """10 µs of compute, of which the last 4 come after a collective that the stream waits for."""
        self.device.enqueue(6000)
        ticket = self.recorder.enter(self.gather, axis=self.tp)
        arrives = self.device.free + 5000
        self.recorder.waits(ticket)
        self.clock.begin(ticket, waited=True)
        self.device.wait_until(arrives)
        self.clock.end(ticket)
        self.recorder.exit(ticket)
        self.device.enqueue(4000)

    def step(self, step: int) -> None:
        """Enqueues one, which takes the host a microsecond."""
        self.recorder.step = step
        self.clock.begin_step(step)
        handlers = {
            Kinds.FORWARD: self.forward,
            Kinds.BACKWARD: lambda op: self.device.enqueue(20000),
            Kinds.NORM: lambda op: self.device.enqueue(1000),
        }
        execute(OPS, handlers, self.recorder)
        self.device.now += 1000


def _parts(row: np.ndarray | None) -> dict[TimePart, int]:
    assert row is not None
    return {part: round(1e9 * row[AT[part]]) for part in TIME_PARTS if round(1e9 * row[AT[part]])}


def _stamped(rank: Rank) -> np.ndarray:
    entries = np.frombuffer(rank.recorder.memory[HEADER_BYTES + NAMES_BYTES :], ON_FILE)
    return entries[(entries["version"] > 0) & (entries["flags"] & DEVICE_TIME > 0)]


def test_a_step_is_divided_by_what_the_device_did() -> None:
    rank = Rank()
    for step in range(3):
        rank.step(step)
        rank.clock.settle(rank.recorder)
    assert not len(_stamped(rank)) and rank.clock.window(0) is None  # the device has not come to any end
    rank.device.now += 45_000
    rank.clock.settle(rank.recorder)
    window = rank.clock.window(0)
    assert window is not None and window[1] - window[0] == 36_000
    first = rank.reader.read([StepTimes(1, *window)])
    assert rank.clock.window(1) is None
    rank.device.now += 100_000
    rank.clock.settle(rank.recorder)
    second = rank.clock.window(1)
    assert second is not None
    for rows in (first, rank.reader.read([StepTimes(2, *second)])):
        assert rows is not None
        (row,) = rows
        assert _parts(row) == {TimePart.COMPUTE: 30_000, TimePart.OPTIMIZER: 1000}
        # Nobody knows when the last rank came to the collective.
        assert row[BLIND + AXES.index(TimePart.TP)] == row[BLIND : BLIND + len(AXES)].sum() == pytest.approx(5e-6)


def test_what_the_host_does_costs_what_the_device_idles_meanwhile() -> None:
    rank = Rank()
    rank.step(0)
    with rank.recorder.span(rank.recorder.intern(kinds.SAVE)) as save:
        rank.device.now += 50_000
    data = rank.recorder.enter(rank.recorder.intern(kinds.DATA))
    rank.device.now += 10_000
    rank.recorder.exit(data)
    rank.recorder.stamp(save.ticket, 1_001_000, 1_051_000)
    rank.recorder.stamp(data, 1_051_000, 1_061_000)
    rank.step(1)
    rank.device.now += 100_000
    rank.clock.settle(rank.recorder)
    window = rank.clock.window(0)
    assert window is not None and window == (1_000_000, 1_061_000)
    rows = rank.reader.read([StepTimes(1, *window)])
    assert rows is not None
    parts = _parts(rows[0])
    assert parts[TimePart.CHECKPOINT] == 51_000 - 36_000 and parts[TimePart.DATA] == 10_000


def test_events_are_used_again_and_clocks_that_drift_are_tied_together() -> None:
    rank = Rank(drift=1.001)
    for step in range(50):
        rank.step(step)
        rank.device.now += 40_000
        rank.clock.settle(rank.recorder)
    assert rank.device.events < 20
    begun = [window for step in range(45, 49) if (window := rank.clock.window(step)) is not None]
    truth = [1_000_000 + 41_000 * step for step in range(45, 49)]
    assert [window[0] for window in begun] == pytest.approx(truth, abs=2000)


def test_what_lies_between_steps_is_in_none() -> None:
    rank = Rank()
    rank.step(0)
    rank.clock.end_step(0)
    rank.device.enqueue(500_000)  # an evaluation
    rank.step(1)
    rank.device.now += 1_000_000
    rank.clock.settle(rank.recorder)
    window = rank.clock.window(0)
    assert window is not None and window[1] - window[0] == 36_000
