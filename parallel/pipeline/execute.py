"""The interpreter: runs one rank's operations in order, and records each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ..record import kinds
from ..record.ring import Recorder
from .kind import Kind
from .program import Op

Handler = Callable[[Op], None]


def execute(
    ops: tuple[Op, ...], handlers: Mapping[Kind, Handler], recorder: Recorder, count: Callable[[], int] | None = None
) -> None:
    """Runs `ops`. Whatever a handler communicates is recorded inside the span of its operation.

    Args:
        count: the bytes on the device, to be recorded after each operation.
    """
    codes, memory = {kind: recorder.intern(kind.token) for kind in handlers}, recorder.intern(kinds.MEMORY)
    computed, device, ticket = time.thread_time_ns(), recorder.device, -1
    spent = 0
    for position, op in enumerate(ops):
        recorder.op, recorder.micro_batch = position, op.index
        ticket = recorder.turn(ticket, codes[op.kind], spent)
        if device is not None:
            device.begin(ticket)
        handlers[op.kind](op)
        if device is not None:
            device.end(ticket)
        before, computed = computed, time.thread_time_ns()
        spent = computed - before
        if count is not None:
            recorder.exit(ticket, cpu=spent)
            recorder.exit(recorder.enter(memory, nbytes=count()))
            ticket = -1
    recorder.leave(ticket, spent)
