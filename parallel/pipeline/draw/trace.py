"""Timelines as a trace for chrome://tracing and Perfetto."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..memory import activation_curve
from ..simulate import Timeline
from .figures import chunk_of, stage_flows

_MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "µs": 1.0}
_COMPUTE_ROW = 0


def chrome_trace(timeline: Timeline, unit: str = "ms") -> dict[str, Any]:
    """A process per rank with a row of operations, rows of what runs beside them and a counter of activations.

    Arrows lead from each stage's pass to the pass on another rank that takes its output. A unit of time other than
    s, ms, us is drawn as a millisecond.
    """
    factor = _MICROSECONDS.get(unit, 1e3)
    chunk, curves = chunk_of(timeline), activation_curve(timeline)
    events: list[dict[str, Any]] = []
    for rank, (ops, spans) in enumerate(zip(timeline.program.ranks, timeline.spans, strict=True)):
        beside = _Rows()
        for position, (op, (start, end)) in enumerate(zip(ops, spans, strict=True)):
            event = {"name": str(op), "cat": op.kind.token, "pid": rank, "ts": start * factor, "args": {"op": position}}
            if op.index >= 0:
                event["args"]["micro_batch" if op.stage >= 0 or op.kind.computes else "index"] = op.index
            if op.stage >= 0:
                event["args"] |= {"stage": op.stage, "chunk": chunk[op.stage]}
            event["tid"] = _COMPUTE_ROW if op.kind.drawn else beside.row(start, end)
            timed = end > start or op.kind.drawn
            events.append(event | ({"ph": "X", "dur": (end - start) * factor} if timed else {"ph": "i", "s": "t"}))
        events += _names(rank, len(beside.ends))
        for time, level in curves[rank]:
            args = {"microbatches": level}
            events.append({"ph": "C", "name": "activations", "pid": rank, "ts": time * factor, "args": args})
    for number, (source, target) in enumerate(stage_flows(timeline)):
        flow = {"cat": "hand-over", "name": "hand-over", "id": number, "tid": _COMPUTE_ROW}
        # Just inside the slice: an arrow binds to the slice that encloses its time.
        leaves = max(source.start, source.end - 1e-6 * (source.end - source.start))
        events.append(flow | {"ph": "s", "pid": source.rank, "ts": leaves * factor})
        events.append(flow | {"ph": "f", "bp": "e", "pid": target.rank, "ts": target.start * factor})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


@dataclass
class _Rows:
    """Rows of one rank for what overlaps: each event goes into the first row that is free."""

    ends: list[float] = field(default_factory=list)

    def row(self, start: float, end: float) -> int:
        free = next((row for row, until in enumerate(self.ends) if until <= start), len(self.ends))
        self.ends[free : free + 1] = [end]
        return free + 1


def _names(rank: int, beside: int) -> list[dict[str, Any]]:
    rows = {_COMPUTE_ROW: "operations"} | {row + 1: "communication" for row in range(beside)}
    return [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}},
        {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}},
        *({"ph": "M", "name": "thread_name", "pid": rank, "tid": t, "args": {"name": n}} for t, n in rows.items()),
    ]
