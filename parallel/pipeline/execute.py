"""The interpreter: runs one rank's operations in order, and records each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..record.ring import Recorder
from .kind import Kind
from .program import Op

Handler = Callable[[Op], None]


def execute(ops: tuple[Op, ...], handlers: Mapping[Kind, Handler], recorder: Recorder) -> None:
    """Runs `ops`. Whatever a handler communicates is recorded inside the span of its operation."""
    codes = {kind: recorder.intern(kind.token) for kind in handlers}
    for position, op in enumerate(ops):
        recorder.op, recorder.micro_batch = position, op.index
        ticket = recorder.enter(codes[op.kind])
        handlers[op.kind](op)
        recorder.exit(ticket)
