"""Copies between the memories of two ranks that took long, and how they come into the record: the links' delays."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from ..record import kinds
from ..record.ring import BESIDE, Recorder

SLOW_NS = 200_000
"""From which on a copy is remembered; shorter ones come many times a step, and take less of it than an entry tells."""


@dataclass(frozen=True)
class SlowCopy:
    """A part that took long to come out of another rank's memory.

    Args:
        rank: whose memory.
        nbytes: of the part.
        begun, ended: monotonic ns.
        thread: which one copied, as `threading.get_ident` has it.
    """

    rank: int
    nbytes: int
    begun: int
    ended: int
    thread: int


def record_copies(recorder: Recorder, axis: int, group: int, copies: Iterable[SlowCopy]) -> None:
    """Writes an entry for each copy of a collective or transfer.

    Whoever waits also copies what belongs to others' collectives, so the thread decides whose time it was.

    Args:
        recorder: of the axis.
        axis, group: of the collective, as in its own entry.
        copies: its.
    """
    for copy in copies:
        own = copy.thread == threading.main_thread().ident
        writer = recorder.origin if own else recorder
        code = writer.intern(kinds.COPY)
        entry = writer.enter(code, axis=axis, group=group, peer=copy.rank, nbytes=copy.nbytes)
        writer.stamp(entry, copy.begun, copy.ended, 0 if own else BESIDE)
