"""What `pentad watch` shows: where each rank stands, the last step's numbers and what happened, all only read."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
_QUIET_S, _QUIET_STEPS = 10.0, 5.0
"""A step that is not reported for so long, or for so many times its length, is late."""
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
    STEPS = "stepping elsewhere"
    QUIET = "elsewhere, no step for long"
    BLAMED = "blamed by its watcher"
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
class FarRank:
    """A rank whose ring cannot be read on this host, as far as the run's files tell.

    Args:
        state: in a word.
        words: the same on one line.
    """

    state: RankState
    words: str


def far_ranks(
    hosts: Mapping[int, str],
    row: Mapping[str, Any],
    age_s: float,
    events: Sequence[Mapping[str, Any]],
) -> dict[int, FarRank]:
    """What metrics.jsonl and the watchers' verdict say of ranks on other hosts: a step is reported once all ranks have
    done it.

    Args:
        hosts: of these ranks.
        row: of the last step; empty: none has been reported.
        age_s: of the last row.
        events: of the run.
    """
    step, seconds = row.get("step"), row.get("step_time_s")
    long_s = max(_QUIET_S, _QUIET_STEPS * seconds if isinstance(seconds, (int, float)) else 0.0)
    last = next((e for e in reversed(events) if e.get("event") in ("start", "end", "stopped", "verdict")), {})
    known = f"its last step is {step}, reported {age_s:.0f} s ago" if row else "no step has been reported yet"
    found = {}
    for rank, host in hosts.items():
        state, more = RankState.STEPS if row and age_s <= long_s else RankState.QUIET, known
        named = last.get("ranks") if last.get("event") == "verdict" else None
        if isinstance(named, list) and rank in named:
            state, more = RankState.BLAMED, str(last.get("line", ""))
        elif last.get("event") in ("end", "stopped"):
            state, more = RankState.DONE, "the run has ended"
        elif last.get("event") == "verdict":
            state, more = RankState.LOST, f"the run was ended by a fault of others: {last.get('line', '')}"
        found[rank] = FarRank(state, f"rank {rank} on {host}: {state.value}, {more}; its ring is there")
    return found


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
        far: the ranks that cannot be read here.
    """

    name: str
    world: int
    alive: bool
    sizes: tuple[int, ...]
    stands: Mapping[int, Stand]
    places: Places
    row: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    far: Mapping[int, FarRank] = field(default_factory=dict)

    def state(self, rank: int) -> RankState:
        """What a rank is at."""
        if rank in self.stands:
            return state_of(self.stands[rank])
        return self.far[rank].state if rank in self.far else RankState.UNSEEN


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
        self._elsewhere: dict[int, str] = {}
        """Hosts of the ranks that are not on this one."""
        self._open()
        if not self._views and not self._elsewhere:
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
        ranks, here = [ring for ring in indexed if ring.epoch == newest], socket.gethostname()
        self._elsewhere = {ring.rank: ring.host for ring in ranks if ring.host != here}
        self._world = max((view.ring.header.world for view in self._views.values()), default=len(ranks))

    def look(self) -> JobView:
        """Where everything stands now."""
        self._open()
        stands = {
            rank: view.now((-1, -1)) if view.alive else view.post_mortem(self._folder)
            for rank, view in self._views.items()
        }
        rows, events = newest_of(self._folder / RunFile.METRICS), newest_of(self._folder / RunFile.EVENTS)
        row = rows[-1] if rows else {}
        elsewhere = {rank: host for rank, host in self._elsewhere.items() if rank not in stands}
        far = far_ranks(elsewhere, row, self._age_s(), events) if elsewhere else {}
        return JobView(
            name=self._folder.resolve().name,
            world=self._world,
            alive=any(stand.condition not in _CONDITIONS for stand in stands.values())
            or any(each.state is RankState.STEPS for each in far.values()),
            sizes=_sizes(stands, self._world),
            stands=stands,
            places=read_places(self._folder, self._world),
            row=row,
            events=events,
            far=far,
        )

    def _age_s(self) -> float:
        """Since the last row was written."""
        try:
            return max(time.time() - (self._folder / RunFile.METRICS).stat().st_mtime, 0.0)
        except OSError:
            return 0.0

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
