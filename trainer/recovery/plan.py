"""Who is in the job's next mesh, as the watcher of a node tells the processes of its node. No torch here.

A process is known by its number in the job: those that start it have 0 to world - 1, spares and those that come later
the numbers after. A plan gives each slot of the mesh of one epoch its member. Epochs follow one another without a gap,
the first mesh has epoch 0 and no plan: so whoever was in the mesh of epoch e waits for the plan e + 1 and, where more
have come meanwhile, goes to the newest.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...configs.strict_json import (
    JsonError,
    expect_int,
    expect_list,
    expect_number,
    expect_object,
    expect_text,
    parse_json,
    read_bytes,
)

_POLL_S, _IDLE_POLL_S = 0.001, 0.005
"""Between two looks: of those that wait in a fault, and of those that have waited for long."""
_IDLE_AFTER_S = 10.0
_MAX_BYTES = 1 << 22
_MAX_NUMBER = 1 << 24
_END = "plan.end"


@dataclass(frozen=True)
class EpochPlan:
    """The mesh of one epoch.

    Args:
        epoch: of the mesh, from 1 on.
        members: the number of the process in each slot.
        lost: numbers of those of the mesh before that are not there any more.
        line: why, as a person reads it.
        seen: when the fault was seen (Unix seconds); 0: not known.
        rung: how the lost ones are replaced (spare, respawn, shrink …).
        store: HOST:PORT where the members meet; empty: where the job began to.
        layout: of the mesh, as `configs.reading.layout.relaid` reads it; empty: the job's own.
        spares: numbers of those that are in no slot and wait for a later plan.

    Raises:
        ValueError: a process is in two slots, or lost and a member, or there is none.
    """

    epoch: int
    members: tuple[int, ...]
    lost: tuple[int, ...]
    line: str
    seen: float = 0.0
    rung: str = ""
    store: str = ""
    layout: str = ""
    spares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.epoch < 1 or not self.members:
            raise ValueError(f"a plan is of epoch 1 or later and has members, not {self.epoch} and {self.members}")
        if len(set(self.members)) < len(self.members) or set(self.members) & set(self.lost):
            raise ValueError(f"members {self.members} are no different processes, or among the lost {self.lost}")
        if set(self.spares) & {*self.members, *self.lost}:
            raise ValueError(f"spares {self.spares} are among the members {self.members} or the lost {self.lost}")

    def dump(self) -> str:
        """As JSON, in one line."""
        return json.dumps(vars(self))

    @staticmethod
    def load(data: bytes) -> EpochPlan:
        """What `dump` wrote.

        Raises:
            JsonError: it is something else.
        """
        found = expect_object(parse_json(data), "the plan", ("epoch", "members", "lost", "line"))
        epoch, line = expect_int(found["epoch"], "epoch"), expect_text(found["line"], "line")
        seen = expect_number(found.get("seen", 0.0), "seen")
        rung, store, layout = (expect_text(found.get(what, ""), what) for what in ("rung", "store", "layout"))
        members, lost, spares = (
            tuple(expect_int(each, what, 0, _MAX_NUMBER) for each in expect_list(found.get(what, []), what))
            for what in ("members", "lost", "spares")
        )
        try:
            return EpochPlan(epoch, members, lost, line, seen, rung, store, layout, spares)
        except ValueError as error:
            raise JsonError(str(error)) from None


class Fenced(Exception):
    """The job goes on, or ends, without this process."""


class PlannedChange(Exception):
    """All ranks leave their mesh after the same step, for one that others are to join."""


def publish_plan(folder: Path, plan: EpochPlan) -> None:
    """Shows a plan to the processes of this node, whole or not at all.

    Args:
        folder: of the job on this node, where nobody else may write.
        plan: of the epoch after that of the plan before.
    """
    _write(folder / f"plan.{plan.epoch}", plan.dump())


def end_plans(folder: Path) -> None:
    """Tells the processes of this node that no plan will come any more."""
    _write(folder / _END, "")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


class Membership:
    """What a process of the job learns of plans.

    Args:
        folder: where its node's watcher publishes them.
        number: of this process in the job.
        world: how many start it.
    """

    def __init__(self, folder: Path, number: int, world: int) -> None:
        self.folder, self.number, self._world = folder, number, world

    @property
    def newcomer(self) -> bool:
        """Whether the job began without this process."""
        return self.number >= self._world

    def wait(self, after: int, seconds: float, stopped: Callable[[], bool] = lambda: False) -> EpochPlan | None:
        """The newest plan of a later epoch, as soon as there is one.

        Args:
            after: epoch of the mesh that this process was in, or of the last plan in which it was not.
            seconds: how long to wait at most.
            stopped: whether this process is to wait no longer.

        Returns:
            None: none will come, or none came in time.

        Raises:
            JsonError: what is there is no plan.
        """
        began, newest = time.monotonic(), None
        while True:
            if (self.folder / _END).exists():
                return None
            while (found := self._read(after + 1)) is not None:
                newest, after = found, after + 1
            waited = time.monotonic() - began
            if newest is not None or stopped() or waited > seconds:
                return newest
            time.sleep(_POLL_S if waited < _IDLE_AFTER_S else _IDLE_POLL_S)

    @property
    def store(self) -> str:
        """HOST:PORT where the members of the newest mesh meet; empty: where the job began to."""
        newest = self.wait(0, 0)
        return newest.store if newest is not None else ""

    def overtaken(self, epoch: int) -> bool:
        """Whether there is a plan of a later epoch: what belongs to `epoch` writes nothing any more."""
        return (self.folder / f"plan.{epoch + 1}").exists()

    def members(self, epoch: int) -> tuple[int, ...] | None:
        """Who was in the mesh of an epoch; None: not known."""
        plan = self._read(epoch) if epoch else None
        return tuple(range(self._world)) if not epoch else plan.members if plan is not None else None

    def _read(self, epoch: int) -> EpochPlan | None:
        path = self.folder / f"plan.{epoch}"
        with contextlib.suppress(FileNotFoundError):
            plan = EpochPlan.load(read_bytes(path, max_bytes=_MAX_BYTES))
            if plan.epoch != epoch:
                raise JsonError(f"{path} is the plan of epoch {plan.epoch}")
            return plan
        return None
