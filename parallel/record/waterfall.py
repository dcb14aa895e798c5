"""Reads a rank's own record after its steps, and divides them into parts.

Short steps are divided several at once: a pass leaves nothing of this code in the caches, so that the first one takes a
hundred microseconds however little there is in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..pipeline.program import Ops
from .division import Codes, Division
from .parts import DURATIONS, PAIRS, QUEUED, STEP
from .ring import BESIDE, Recorder
from .slots import END, FLAGS, START, WAITED


def durations_of(ops: Ops) -> tuple[tuple[str, int], ...]:
    """(token, stage) of the computing operations of a rank, the order of the durations in its row."""
    found = {(op.kind.token, op.stage): None for op in ops if op.kind.computes}
    return tuple(found)


class StepTimes(NamedTuple):
    """A step that is to be divided."""

    step: int
    """Its number, from 1."""
    begin: int
    end: int
    """When it began and ended (monotonic ns)."""
    pairs: float = 0.0
    """Attention pairs of the rank's own microbatches."""


class StepReader:
    """Reads a rank's own record.

    Args:
        recorder: of the rank; this process writes it.
        ops: what the rank does in a step.
        pipelined: whether there are other stages to wait for.
    """

    def __init__(self, recorder: Recorder, ops: Ops, *, pipelined: bool) -> None:
        self._recorder, self._pipelined = recorder, pipelined
        recorder.take_ended()
        self._codes = Codes.of(recorder.names, pipelined)
        self._durations = durations_of(ops)
        places = {key: place for place, key in enumerate(self._durations)}
        self._place = tuple(places.get((op.kind.token, op.stage), -1) for op in ops)

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return DURATIONS + len(self._durations)

    def read(self, steps: Sequence[StepTimes], queued_s: float = 0.0) -> np.ndarray | None:
        """The rows (steps, `size`) of one or several steps, in their order; None where the ring has come round since
        the last ones were read.

        queued_s: how long the rank's thread waited for a core in all of them.
        """
        ended = self._recorder.take_ended()
        if self._recorder.known != self._codes.names:
            self._codes = Codes.of(self._recorder.names, self._pipelined)
        if len(ended) > self._recorder.capacity:
            return None
        on_device, rows = self._recorder.device is not None, []
        queued = queued_s / max(sum(each.end - each.begin for each in steps), 1)
        for each, entries in zip(steps, self._fresh(ended, [each.end for each in steps]), strict=True):
            division = Division(entries, self._codes, each.begin, each.end, on_device=on_device)
            row = division.row(self._place, self.size)
            row[STEP], row[PAIRS], row[QUEUED] = each.step, each.pairs, queued * (each.end - each.begin)
            rows.append(row)
        return np.array(rows)

    def _fresh(self, ended: Mapping[int, list[int]], ends: Sequence[int]) -> list[list[list[int]]]:
        """For each step its entries; what began after the last one, or is still to be timed on the device, waits for
        the next call."""
        found: list[list[list[int]]] = [[] for _ in ends]
        late, device, until = {}, self._recorder.device, ends[-1]
        for ticket, entry in ended.items():
            # What began before a step counts in the step where it is waited for.
            begun = entry[WAITED] or entry[START]
            if begun >= until or (device is not None and ticket in device):
                late[ticket] = entry
                continue
            place = bisect_right(ends, begun) if len(ends) > 1 else 0
            found[place].append(entry)
            if entry[FLAGS] & BESIDE:  # and is waited for in the steps that it goes on in
                for later in found[place + 1 : bisect_right(ends, entry[END]) + 1]:
                    later.append(entry)
        if late:
            self._recorder.put_back(late)
        return found
