"""What really ran: a run's record as a timeline of the program, to be drawn, compared and learned from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...configs.errors import Problem, UserError
from ..record.files import read_index, read_ring
from ..record.kinds import MEMORY, WAIT
from ..record.reader import RecordError, RecordRing
from .program import Ops, Program
from .simulate import Curve, Timeline
from .times import Times


def actual(
    program: Program,
    record: Path | str | Sequence[RecordRing],
    step: int,
    *,
    replica: int = 0,
    times: Times = Times(),  # noqa: B008 (frozen)
) -> Timeline:
    """The timeline of one step that really ran: seconds since the first operation of any rank started.

    What an operation waited for its data is not part of its span: it starts when its computation did. The bytes that
    it holds are those after each operation, beyond the least of a rank's, where the run recorded them (`log.memory`).

    Args:
        program: what the ranks of the pipeline ran.
        record: the run's folder (with record/index.json), or rings of one host.
        step: number of the step.
        replica: which of the pipelines of the run, 0 to world / p - 1; ranks of a stage are neighbours.
        times: what was planned, for `readings` to tell communication from other waiting; they change no span.

    Raises:
        UserError: the record does not hold this step of this program.
        OSError, RecordError: the record cannot be read.
    """
    pipeline = _pipeline(_with_clocks(record), len(program.ranks), replica)
    spans = [_spans(ring, ops, step, clock) for (ring, clock), ops in zip(pipeline, program.ranks, strict=True)]
    origin = min((start for rank in spans for start, _ in rank), default=0)
    seconds = tuple(tuple(((s - origin) / 1e9, (e - origin) / 1e9) for s, e in rank) for rank in spans)
    return Timeline(program, seconds, times, _held(pipeline, step, origin))


def _held(pipeline: list[tuple[RecordRing, int]], step: int, origin: int) -> tuple[Curve, ...]:
    """The bytes on each rank's device after each operation, beyond the least of them; none were recorded: empty."""
    curves = []
    for ring, clock in pipeline:
        entries = ring.entries[(ring.entries["step"] == step) & (ring.entries["op"] >= 0)]
        counted = entries[(entries["kind"] == _code(ring, MEMORY)) & (entries["end"] > 0)]
        least = int(counted["nbytes"].min()) if len(counted) else 0
        points = zip(counted["end"].tolist(), counted["nbytes"].tolist(), strict=True)
        curves.append(tuple(((end + clock - origin) / 1e9, float(nbytes - least)) for end, nbytes in points))
    return tuple(curves) if all(curves) else ()


def last_step(program: Program, record: Path | str | Sequence[RecordRing], *, replica: int = 0) -> int:
    """The last step of which every rank of the pipeline has a complete record; arguments and errors as of `actual`."""
    pipeline = _pipeline(_with_clocks(record), len(program.ranks), replica)
    steps = [set(ring.entries["step"][ring.entries["op"] >= 0].tolist()) for ring, _ in pipeline]
    for step in sorted(set.intersection(*steps), reverse=True):
        try:
            for (ring, clock), ops in zip(pipeline, program.ranks, strict=True):
                _spans(ring, ops, step, clock)
        except UserError:
            continue
        return step
    raise UserError("the record holds no complete step of the run's program; give the run's program, or record longer")


def _with_clocks(record: Path | str | Sequence[RecordRing]) -> list[tuple[RecordRing, int]]:
    """Rings, and what to add to each one's monotonic times so that they stand on one clock.

    Ranks of one host share the monotonic clock; hosts are brought together by their wall clocks.
    """
    if not isinstance(record, (Path, str)):
        return [(ring, 0) for ring in record]
    folder = Path(record)
    indexed = read_index(folder)
    newest = max((ring.epoch for ring in indexed), default=0)
    offsets: dict[str, int] = {}
    found = []
    for file in indexed:
        if file.epoch == newest:
            ring = read_ring(folder, file)
            header = ring.header
            found.append((ring, offsets.setdefault(file.host, header.wall_ns - header.mono_ns)))
    return found


def _pipeline(found: list[tuple[RecordRing, int]], ranks: int, replica: int) -> list[tuple[RecordRing, int]]:
    """The rings of one pipeline, first rank first. The pipeline axis is the slowest of the mesh."""
    by_rank = {ring.header.rank: (ring, clock) for ring, clock in found}
    world = max((ring.header.world for ring, _ in found), default=0)
    if not world or world % ranks:
        raise UserError(f"the record is of {world} ranks, the program of a pipeline of {ranks}; give the run's program")
    inner = world // ranks
    if not 0 <= replica < inner:
        raise UserError(f"there is no pipeline {replica}: {world} ranks make {inner} pipelines of {ranks}")
    wanted = [rank * inner + replica for rank in range(ranks)]
    missing = [rank for rank in wanted if rank not in by_rank]
    if missing:
        raise UserError(f"the record lacks rank {', '.join(map(str, missing))} of {world}; collect it from its host")
    return [by_rank[rank] for rank in wanted]


def _spans(ring: RecordRing, ops: Ops, step: int, clock: int) -> list[tuple[int, int]]:
    """Start and end in ns of a rank's operations, waits taken off their starts."""
    rank, entries = ring.header.rank, ring.entries
    entries = entries[(entries["step"] == step) & (entries["op"] >= 0)]
    if not len(entries):
        held = sorted({int(s) for s in ring.entries["step"][ring.entries["op"] >= 0]})
        has = f"it holds steps {held[0]} to {held[-1]}" if held else "it holds no step of a program"
        raise UserError(Problem("step", f"step {step} is not in the record of rank {rank}; {has}"))
    codes = {name: code for code, name in enumerate(ring.names)}
    expected = np.array([codes.get(op.kind.token, -1) for op in ops], np.int64)
    entries = entries[entries["op"] < len(ops)]
    own = entries[entries["kind"] == expected[entries["op"]]]
    run = _complete(own, len(ops))
    if run is None:
        most = max((len(part) for part in _runs(own)), default=0)
        raise UserError(
            f"step {step} of rank {rank}: {most} of {len(ops)} operations of the program are in the record; the run had"
            " another program, was stopped in this step, or its ring is too short (faults.record_entries)"
        )
    starts = run["start"].copy()
    waits = entries[(entries["kind"] == codes.get(WAIT, -1)) & (entries["end"] > 0)]
    for wait in waits:
        position = int(wait["op"])
        if run["start"][position] <= wait["start"] and wait["end"] <= run["end"][position]:
            starts[position] = max(starts[position], wait["end"])
    return [(int(s) + clock, int(e) + clock) for s, e in zip(starts, run["end"], strict=True)]


def _code(ring: RecordRing, name: str) -> int:
    """The number of a kind in a ring; -1: it has none."""
    return ring.names.index(name) if name in ring.names else -1


def _runs(own: np.ndarray) -> list[np.ndarray]:
    """Entries of operations, cut where their position falls back: a step may be evaluated as well as trained."""
    return np.split(own, np.flatnonzero(np.diff(own["op"]) <= 0) + 1) if len(own) else []


def _complete(own: np.ndarray, count: int) -> np.ndarray | None:
    whole = (part for part in _runs(own) if len(part) == count and bool((part["end"] > 0).all()))
    return next(whole, None)


__all__ = ["RecordError", "actual", "last_step"]
