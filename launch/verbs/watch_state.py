"""What `pentad watch` shows: where each rank stands, the last step's numbers and what happened, all only read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...configs import UserError
from ...parallel.record.files import read_index
from ...parallel.record.parts import TimePart, part_of_axis
from ...parallel.record.reader import RecordError
from ...parallel.record.stand import Condition, Stand
from ...parallel.record.verdict_words import Places, call_words, place_words
from ...trainer.metrics.summary import newest_of
from ...trainer.run_folder import RunFile
from ..supervise.ring_view import RingView
from ..supervise.worker_files import read_places

_NEWEST = 64
"""Entries of each ring that are looked at: those of the operation under way are among them."""
_AXES = ("tp", "cp", "dp", "pp")
"""From the fastest to the slowest of the mesh."""


class RankState(StrEnum):
    """What a rank is at, in a word."""

    COMPUTING = "computing"
    WAITING = "waiting"
    DATA = "data"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"
    STARTING = "starting"
    ENDING = "ending"
    DONE = "done"
    DEAD = "dead"
    STOPPED = "stopped"
    FROZEN = "frozen"
    FAILED = "failed"
    LOST = "lost a peer"
    UNSEEN = "not seen here"


_PHASES = {
    "data": RankState.DATA,
    "save": RankState.CHECKPOINT,
    "evaluation": RankState.EVALUATION,
    "start": RankState.STARTING,
    "load": RankState.STARTING,
    "end": RankState.ENDING,
}
_CONDITIONS = {
    Condition.DEAD: RankState.DEAD,
    Condition.STOPPED: RankState.STOPPED,
    Condition.FROZEN: RankState.FROZEN,
    Condition.FAILED: RankState.FAILED,
    Condition.LOST: RankState.LOST,
    Condition.DONE: RankState.DONE,
}


def state_of(stand: Stand) -> RankState:
    """In a word; what has ended, stopped or fallen silent comes first, then its phase, then what it waits for."""
    if stand.condition in _CONDITIONS:
        return _CONDITIONS[stand.condition]
    if stand.phase in _PHASES:
        return _PHASES[stand.phase]
    return RankState.COMPUTING if stand.waits is None else RankState.WAITING


def waited_axis(stand: Stand) -> str:
    """The axis that a rank waits for; "lane" and "copies" for what runs beside it; empty if it waits for none."""
    if stand.waits is None or state_of(stand) is not RankState.WAITING:
        return ""
    part = part_of_axis(stand.waits.axis)
    return stand.waits.axis or "copies" if part is TimePart.OTHER else part.value


def rank_words(stand: Stand, places: Places) -> str:
    """The open operation of a rank, on one line."""
    state, axis = state_of(stand), waited_axis(stand)
    host = f" on {stand.host}" if stand.host else ""
    words = [f"rank {stand.rank}{host}: {state.value}{f' for {axis}' if axis else ''}"]
    if state is RankState.FAILED and stand.line:
        words.append(stand.line)
    if stand.waits is not None and axis:
        words.append(call_words(stand.waits))
    words.append(place_words(stand, places))
    if stand.condition is Condition.RUNS:
        words.append(f"last progress {stand.idle_s:.1f} s ago")
    return ", ".join(words)


@dataclass(frozen=True)
class JobView:
    """One look at a job.

    Args:
        name: of its folder.
        world: ranks.
        alive: whether one of them lives on this host.
        sizes: of the axes tp, cp, dp and pp; empty: not known.
        stands: of the ranks that can be read here.
        places: words for operations.
        row: the last step's metrics.
        events: the newest.
    """

    name: str
    world: int
    alive: bool
    sizes: tuple[int, ...]
    stands: Mapping[int, Stand]
    places: Places
    row: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]


class JobReader:
    """Looks at a job again and again.

    Args:
        folder: of the run.

    Raises:
        UserError: there is no record of a run in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._views: dict[int, RingView] = {}
        self._known: object = None
        self._open()
        if not self._views:
            raise UserError(f"{folder}: none of the rings of its record can be read here")

    def _open(self) -> None:
        """Opens the rings that the index lists; anew when the job was started anew."""
        try:
            indexed = read_index(self._folder)
        except (OSError, RecordError) as error:
            message = f"{self._folder}: no record of a run can be read there ({error}); give the folder of a run"
            raise UserError(message) from None
        if indexed == self._known:
            return
        self._known = indexed
        self.close()
        newest = max((ring.epoch for ring in indexed), default=0)
        for ring in indexed:
            if ring.epoch == newest and (view := RingView.open(self._folder, ring, newest=_NEWEST)) is not None:
                self._views[view.rank] = view
        self._world = max((view.ring.header.world for view in self._views.values()), default=0)

    def look(self) -> JobView:
        """Where everything stands now."""
        self._open()
        stands = {
            rank: view.now((-1, -1)) if view.alive else view.post_mortem(self._folder)
            for rank, view in self._views.items()
        }
        rows = newest_of(self._folder / RunFile.METRICS)
        return JobView(
            name=self._folder.resolve().name,
            world=self._world,
            alive=any(stand.condition not in _CONDITIONS for stand in stands.values()),
            sizes=_sizes(stands, self._world),
            stands=stands,
            places=read_places(self._folder, self._world),
            row=rows[-1] if rows else {},
            events=newest_of(self._folder / RunFile.EVENTS),
        )

    def close(self) -> None:
        """Lets go of all files."""
        for view in self._views.values():
            view.close()
        self._views.clear()


def _sizes(stands: Mapping[int, Stand], world: int) -> tuple[int, ...]:
    """Of the mesh's axes, by what the ranks' rings say of their own."""
    members = next((stand.members for stand in stands.values() if stand.members), {})
    sizes = tuple(len(members.get(axis, (0,))) for axis in _AXES)
    product = 1
    for size in sizes:
        product *= size
    return sizes if product == world else ()
