"""The time of a step by module, from the entries that `log.modules` has written into a rank's record, else by
operation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..pipeline.needs import KINDS, Kinds
from ..pipeline.program import Op
from . import kinds
from .reader import RecordRing
from .ring import BESIDE

FORWARD, BACKWARD = "forward ", "backward "
"""How the kinds of modules' entries begin."""
REST_FORWARD, REST_BACKWARD = FORWARD + "rest", BACKWARD + "rest"
"""Residual sums, embeddings, and what lies between modules."""
OTHER = "other"
WHOLE_FORWARD, WHOLE_BACKWARD = "forward", "backward"
"""All of a pass, where nobody has recorded its modules."""

_OPS = {
    Kinds.FORWARD: REST_FORWARD, Kinds.BACKWARD: REST_BACKWARD, Kinds.INPUT_GRAD: REST_BACKWARD,
    Kinds.WEIGHT_GRAD: "backward weights", Kinds.HEAD: FORWARD + "head", Kinds.HEAD_GRAD: BACKWARD + "head",
    Kinds.EMBED: FORWARD + "embedding", Kinds.EMBED_GRAD: BACKWARD + "embedding",
    Kinds.REDUCE: "reduce gradients", Kinds.GATHER: "gather parameters",
    Kinds.NORM: "optimizer", Kinds.OPTIMIZE: "optimizer",
}  # fmt: skip
_SECTIONS = {
    kinds.DATA: "data", kinds.SETTLE: "optimizer", kinds.DRAIN: "report", kinds.REPORT: "report",
    kinds.SAVE: "checkpoint",
    kinds.SNAPSHOT: "snapshot",
}  # fmt: skip


def recorded_steps(ring: RecordRing) -> list[int]:
    """The steps (from 0) of which the ring has entries of modules."""
    codes = [code for code, name in enumerate(ring.names) if name.startswith(FORWARD)]
    return sorted({int(step) for step in ring.entries["step"][np.isin(ring.entries["kind"], codes)]})


def whole_steps(ring: RecordRing) -> list[int]:
    """The steps (from 0) of which the ring has everything, and in whose time no evaluation lies."""
    entries, names = ring.entries[ring.entries["flags"] & BESIDE == 0], ring.names

    def of(kind: str) -> np.ndarray:
        return entries[entries["kind"] == (names.index(kind) if kind in names else -1)]

    ends = dict(zip(of(kinds.DRAIN)["step"].tolist(), of(kinds.DRAIN)["end"].tolist(), strict=True))
    begun = set(of(kinds.DATA)["step"].tolist())
    pauses = of(kinds.EVALUATE)["start"].tolist()
    return sorted(
        step
        for step, end in ends.items()
        if end and step in begun and ends.get(step - 1) and not any(ends[step - 1] <= at < end for at in pauses)
    )


def operation_names(tokens: Sequence[str], *, staged: bool) -> list[str]:
    """What the operations of a rank's program are called in a table, by their index.

    Args:
        tokens: of the program.
        staged: whether there are several stages, to be told from each other.

    Raises:
        ValueError: a token is no operation.
    """
    whole = {REST_FORWARD: WHOLE_FORWARD, REST_BACKWARD: WHOLE_BACKWARD}
    found = []
    for op in map(Op.parse, tokens):
        label = _OPS.get(op.kind, "pipeline")
        label = whole.get(label, label)
        found.append(f"{label} stage {op.stage}" if staged and op.kind.computes else label)
    return found


def by_module(ring: RecordRing, step: int, operations: Sequence[str] = ()) -> tuple[dict[str, float], float]:
    """Seconds of a step by module, collective and phase, and of the whole step; they sum to it.

    Each moment belongs to the innermost entry that is open then: a wait for a collective to the collective, the rest of
    a module to the module, the rest of an operation to it.

    Args:
        ring: of a rank.
        step: counted from 0, one of `recorded_steps`, or of `whole_steps`.
        operations: names of the program's operations, for a step without entries of modules.
    """
    entries = ring.entries[ring.entries["flags"] & BESIDE == 0]
    names = ring.names
    start, end = _bounds(entries, names, step)
    entries = entries[(entries["start"] < end) & ((entries["end"] > start) | (entries["end"] == 0))]
    spans: list[tuple[int, int, str]] = []
    for entry in entries:
        name, axis = names[entry["kind"]], names[entry["axis"]]
        begun = entry["waited"] if entry["waited"] else entry["start"]
        op = int(entry["op"])
        named = name in KINDS and 0 <= op < len(operations)
        label = operations[op] if named else _label(name, axis, bool(entry["waited"]))
        if label is not None:
            spans.append((int(begun), int(entry["end"]), label))
    return _innermost([span for span in spans if start <= span[0] < end], start, end), (end - start) / 1e9


def _label(name: str, axis: str, waited: bool) -> str | None:
    if name in KINDS:
        return _OPS.get(KINDS[name], "pipeline")
    if name.startswith((FORWARD, BACKWARD)) or name == kinds.RECOMPUTE:
        return name
    if name == kinds.COLLECT:
        return "gc"
    if name == kinds.WAIT:
        return f"wait for {axis}" if axis else None
    return _SECTIONS.get(name) or (f"{name} {axis.split(' ')[0]}" if waited else None)


def _bounds(entries: np.ndarray, names: tuple[str, ...], step: int) -> tuple[int, int]:
    """When the numbers of the step before were there, and when its own."""
    drains = entries[entries["kind"] == names.index(kinds.DRAIN)]
    ends = dict(zip(drains["step"].tolist(), drains["end"].tolist(), strict=True))
    data = entries[(entries["kind"] == names.index(kinds.DATA)) & (entries["step"] == step)]
    return int(ends.get(step - 1, data["start"].min())), int(ends[step])


def _innermost(spans: list[tuple[int, int, str]], start: int, end: int) -> dict[str, float]:
    """Seconds of each label; of several spans the one that began last, and of those the shortest."""
    found: dict[str, float] = {}
    moments = sorted({start, end, *(m for begun, over, _ in spans for m in (begun, over or end) if start < m < end)})
    coming = sorted(spans, key=lambda span: (span[0], -(span[1] or end)))
    under_way: list[tuple[int, int, str]] = []
    at = 0
    for moment, following in pairwise(moments):
        while at < len(coming) and coming[at][0] <= moment:
            under_way.append(coming[at])
            at += 1
        # An entry that its end never came to (a first module's backward pass) ends with whatever holds it.
        while under_way and under_way[-1][1] and under_way[-1][1] <= moment:
            under_way.pop()
        under_way = [span for span in under_way if not span[1] or span[1] > moment]
        if not any(span[1] for span in under_way):
            under_way = []
        label = under_way[-1][2] if under_way else OTHER
        found[label] = found.get(label, 0.0) + (following - moment) / 1e9
    return found
