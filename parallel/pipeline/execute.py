"""The interpreter: runs one rank's operations in order, and records each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..record.ring import Recorder
from .kind import Kind
from .program import Op

Handler = Callable[[Op], None]

MEMORY = "memory"
"""Kind of the entries that say how many bytes are on the device after an operation, where somebody counts them."""


def execute(
    ops: tuple[Op, ...], handlers: Mapping[Kind, Handler], recorder: Recorder, count: Callable[[], int] | None = None
) -> None:
    """Runs `ops`. Whatever a handler communicates is recorded inside the span of its operation.

    Args:
        count: the bytes on the device, to be recorded after each operation.
    """
    codes, memory = {kind: recorder.intern(kind.token) for kind in handlers}, recorder.intern(MEMORY)
    for position, op in enumerate(ops):
        recorder.op, recorder.micro_batch = position, op.index
        ticket = recorder.enter(codes[op.kind])
        handlers[op.kind](op)
        recorder.exit(ticket)
        if count is not None:
            recorder.exit(recorder.enter(memory, nbytes=count()))
