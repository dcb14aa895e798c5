"""When a device really did what the host enqueued: events from a pool, whose times come into the record a step later.

The host runs ahead of a GPU, so what it reads from its own clock around a call says little. Two events around the call,
on the stream that it goes to, tell when the device came there. They are read once the device has passed them, without
waiting, and stamped into the entry on the host's clock:

    host     enter F │ enter B │ …                     settle: stamp F and B
    device            ▏──── F ────▏──── B ────▏
    events            e0          e1          e2

Each step begins with an event of its own, from which the others are counted: the device's counter has single precision,
and the two clocks drift apart. An event cannot have been passed before it was enqueued, nor after it was seen to be:
that ties the clocks together again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .ring import DEVICE_TIME, Recorder

_STEPS_KEPT = 8


class DeviceEvent(Protocol):
    """What is asked of `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> object:
        """Enqueues it on the current stream."""
        ...

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...

    def synchronize(self) -> object:
        """Returns when the device has passed it."""
        ...

    def elapsed_time(self, other: Any, /) -> float:
        """Milliseconds from this one to another."""
        ...


@dataclass
class _Pending:
    """What waits for its events: an entry, or, without a ticket, the beginning of a step."""

    begin: DeviceEvent
    enqueued: int
    ticket: int = -1
    step: int = -1
    ends: bool = False
    """Whether it is the end of the step."""
    end: DeviceEvent | None = None
    waited: bool = False
    """Whether it is the wait inside a collective's entry that is timed."""


class DeviceClock:
    """The times of one rank's device.

    Args:
        make: a new event.
        now: the host's clock, in ns.
    """

    def __init__(self, make: Callable[[], DeviceEvent], now: Callable[[], int] = time.monotonic_ns) -> None:
        self._make, self._now = make, now
        self._pool: list[DeviceEvent] = []
        self._pending: deque[_Pending] = deque()
        self._open: dict[int, _Pending] = {}
        self._base = self._event()
        self._base.synchronize()
        self._base_ns = now()
        self._begun: dict[int, int] = {}
        self._ended: dict[int, int] = {}

    def __contains__(self, ticket: int) -> bool:
        """Whether the times of an entry are still to come."""
        return ticket in self._open

    def _event(self) -> DeviceEvent:
        event = self._pool.pop() if self._pool else self._make()
        event.record()
        return event

    def begin_step(self, step: int) -> None:
        """All that is enqueued from now on belongs to a step or comes after it."""
        self._pending.append(_Pending(self._event(), self._now(), step=step))

    def end_step(self, step: int) -> None:
        """A step that does not last until the next one begins, because there is something else between them."""
        self._pending.append(_Pending(self._event(), self._now(), step=step, ends=True))

    def window(self, step: int) -> tuple[int, int] | None:
        """When one of the last steps began and ended on the device; None where it did not come that far."""
        begin, end = self._begun.get(step), self._ended.get(step, self._begun.get(step + 1))
        return None if begin is None or end is None else (begin, end)

    def begin(self, ticket: int, *, waited: bool = False) -> None:
        """The device's part of an entry begins here, or, with `waited`, its stream's wait for it."""
        pending = _Pending(self._event(), self._now(), ticket, waited=waited)
        self._pending.append(pending)
        self._open[ticket] = pending

    def end(self, ticket: int) -> None:
        """It ends here."""
        self._open[ticket].end = self._event()

    def settle(self, recorder: Recorder) -> None:
        """Stamps all entries that the device has passed, in their order."""
        while self._pending and self._passed(self._pending[0]):
            each = self._pending.popleft()
            if each.ticket < 0:
                self._move_base(each)
                continue
            start = self._base_ns + self._since(each.begin)
            assert each.end is not None
            end = self._base_ns + self._since(each.end)
            if each.waited:
                recorder.stamp(each.ticket, None, end, DEVICE_TIME, waited=start)
            else:
                recorder.stamp(each.ticket, start, end, DEVICE_TIME)
            del self._open[each.ticket]
            self._pool += (each.begin, each.end)

    def _passed(self, each: _Pending) -> bool:
        return (each.end or each.begin).query() and (each.ticket < 0 or each.end is not None)

    def _since(self, event: DeviceEvent) -> int:
        return round(1e6 * self._base.elapsed_time(event))

    def _move_base(self, each: _Pending) -> None:
        at = self._base_ns + self._since(each.begin)
        self._pool.append(self._base)
        self._base, self._base_ns = each.begin, min(max(at, each.enqueued), self._now())
        times = self._ended if each.ends else self._begun
        times[each.step] = self._base_ns
        for old in [step for step in times if step <= each.step - _STEPS_KEPT]:
            del times[old]
