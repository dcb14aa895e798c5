"""What the codes of a record's entries mean where its time is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..pipeline.kind import Role
from ..pipeline.needs import KINDS, Kinds
from . import kinds
from .parts import AT, TimePart, part_of_axis

_SECTIONS = {
    kinds.DATA: TimePart.DATA,
    kinds.SETTLE: TimePart.OFFLOAD,
    kinds.DRAIN: TimePart.REPORT,
    kinds.REPORT: TimePart.REPORT,
    kinds.SAVE: TimePart.CHECKPOINT,
    kinds.SNAPSHOT: TimePart.SNAPSHOT,
    kinds.EVALUATE: TimePart.OTHER,
}
_ROLES = {
    Role.COMPUTE: TimePart.COMPUTE,
    Role.SEND: TimePart.PP,
    Role.RECEIVE: TimePart.PP,
    Role.COLLECTIVE: TimePart.VOCABULARY,
    Role.COPY: TimePart.OFFLOAD,
    Role.MEMORY: TimePart.OFFLOAD,
    Role.UPDATE: TimePart.OPTIMIZER,
}


class EntryClass:
    """What an entry is."""

    TOP, COLLECTIVE, WAIT, AGAIN, GARBAGE, COPY, NOTHING = range(7)


@dataclass(frozen=True)
class Codes:
    """What the record's codes mean: for each code of a kind its class and its part, and whether what is waited for in
    it is the end of a pipeline; for each code of an axis its part."""

    names: int
    kind: tuple[int, ...]
    part: tuple[int, ...]
    tail: tuple[bool, ...]
    axis: tuple[int, ...]

    @staticmethod
    def of(names: Sequence[str], pipelined: bool) -> Codes:
        tails = {Kinds.NORM.token, kinds.DRAIN} if pipelined else set()
        axes = [TimePart.OFFLOAD if name == kinds.COPIES else part_of_axis(name) for name in names]
        return Codes(
            len(names),
            tuple(_class_of(name) for name in names),
            tuple(AT[_part_of(name)] for name in names),
            tuple(name in tails for name in names),
            tuple(AT[part] for part in axes),
        )


def _class_of(name: str) -> int:
    if name in KINDS or name in _SECTIONS:
        return EntryClass.TOP
    others = {
        kinds.WAIT: EntryClass.WAIT,
        kinds.RECOMPUTE: EntryClass.AGAIN,
        kinds.COLLECT: EntryClass.GARBAGE,
        kinds.COPY: EntryClass.COPY,
    }
    return others.get(
        name, EntryClass.NOTHING if name in ("", kinds.MEMORY, kinds.WRITE, kinds.BARRIER) else EntryClass.COLLECTIVE
    )


def _part_of(name: str) -> TimePart:
    if name in KINDS:
        kind = KINDS[name]
        return TimePart.DP if kind in (Kinds.REDUCE, Kinds.GATHER) else _ROLES[kind.role]
    return _SECTIONS.get(name, TimePart.OTHER)
