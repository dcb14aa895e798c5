"""The way of a process from one mesh of its job into the next.

    a wait is given up ── break off ── leave the mesh ── the plan comes ── meet in a new mesh ── restore ── train on
                      notice           leave          wait              groups              state

What it brings is its memory, if that is the state after a step; else it takes the state from copies on its node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ...configs.schema import Config
from ..checkpoint.state import all_tensors
from ..job.outputs import Outputs
from ..metrics.peak import Peak
from ..metrics.report import Report
from ..overlap import ChunkSearch
from ..processes.failure import is_loss
from ..processes.meeting import Meeting
from ..processes.start import Start
from ..session import Here, Restore, Session, SessionState
from ..trainer import Trainer
from .keeper import SnapshotKeeper
from .plan import EpochPlan, Fenced, Membership, PlannedChange
from .point import RunPoint
from .recovered import LOST_STEPS, MTTR
from .restore import Known, Live, StateRestore
from .ways import relaid_for


@dataclass(frozen=True)
class Epoch:
    """One mesh of the job.

    Args:
        number: how many there were before.
        members: the number of the process in each slot.
        plan: by which it came about; none: it is the first one.
    """

    number: int
    members: tuple[int, ...]
    plan: EpochPlan | None = None


@dataclass(frozen=True)
class _Left:
    """What a process has after it left a mesh.

    Args:
        job, slot: in that mesh.
        state: what the session left.
        live: the same as pieces; none: it is not the state after a step.
    """

    job: Config
    slot: int
    state: SessionState
    live: Live | None

    def close(self) -> None:
        """Gives back what no session has taken over."""
        if self.state.place is not None:
            self.state.place.close()


class Rejoining:
    """What a process keeps from mesh to mesh.

    Args:
        cfg: the job.
        membership: from where plans come.
        here: this process.
        meeting: where its job's ranks meet.
        stopped: whether it was asked to stop.
    """

    def __init__(
        self, cfg: Config, membership: Membership, here: Here, meeting: Meeting, stopped: Callable[[], bool]
    ) -> None:
        self._cfg, self._membership, self._meeting, self._stopped = cfg, membership, meeting, stopped
        self.here = here
        """This process, as it comes to the next mesh."""
        self.keeper = SnapshotKeeper(membership.folder, membership.number)
        self._left: _Left | None = None
        self._old: _Left | None = None
        """What was left behind in a mesh of other pieces, until those of the new one are filled from it."""
        self._restore: StateRestore | None = None
        self._job = cfg
        """As the newest mesh has it."""
        self._begun: dict[int, int] = {}
        """Step at which each mesh began, by epoch."""
        self._peak: Peak | None = None
        self._search: ChunkSearch | None = None
        self._session: Session | None = None
        self._trainer: Trainer | None = None
        self._epoch = Epoch(0, ())
        self._done = False
        self._times: dict[str, float] = {}
        """Unix time at the end of each part of the way."""

    @staticmethod
    def of(cfg: Config, start: Start, here: Here) -> Rejoining | None:
        """None: a fault ends the job."""
        if start.membership is None:
            return None
        return Rejoining(cfg, start.membership, here, start.meeting, lambda: start.stop.requested)

    # Between two meshes -----------------------------------------------------------------------------------------

    def called(self, after: int = 0) -> Epoch:
        """Of a process that no mesh needs at first: the one that needs it.

        Args:
            after: the last epoch in which it was not needed.

        Raises:
            Fenced: the job ends without it.
        """
        self.here.recorder.vitals.ready()
        while not self._stopped():
            plan = self._membership.wait(after, _LONG_S, self._stopped)
            if plan is None:
                break
            if self._membership.number in plan.members:
                self.here.recorder.vitals.goes_on()
                return self._entered(plan)
            after = plan.epoch
        raise Fenced

    def following(self, epoch: Epoch, error: Exception) -> Epoch | None:
        """After an error, or where all leave: the next mesh, when this rank has left the one before; None: the error is
        the end.

        Raises:
            Fenced: the job goes on without this process.
        """
        planned = isinstance(error, PlannedChange)
        if self._done or not (planned or is_loss(error)):
            return None
        vitals = self.here.recorder.vitals
        if planned:
            vitals.ready()
        else:
            vitals.out()
        self._times = {"notice": time.time()}
        self._leave(lost=not planned)
        self._times["leave"] = time.time()
        plan = self._membership.wait(epoch.number, self._cfg.faults.timeout_s)
        if plan is None:
            return None
        if self._membership.number in plan.spares:
            self._give_back()
            self.keeper.close()
            return self.called(plan.epoch)
        if self._membership.number not in plan.members:
            raise Fenced
        vitals.goes_on()
        return self._entered(plan)

    def _entered(self, plan: EpochPlan) -> Epoch:
        self._times["wait"] = time.time()
        store = self._meeting.move(plan.store, self._cfg.faults.timeout_s)
        self.here = replace(self.here, store=store)
        return Epoch(plan.epoch, plan.members, plan)

    def _leave(self, *, lost: bool) -> None:
        """Leaves the mesh, in the middle of anything if others were `lost`."""
        session, trainer, self._session, self._trainer = self._session, self._trainer, None, None
        if session is None:
            self._left, self._old = self._old, None  # nothing has taken its place
            return
        point = None
        if lost:
            session.mesh.abort.trigger("other ranks are lost")
            session.stepper.reset(lost=True)
            point = trainer.left_at if trainer is not None else None
        elif trainer is not None:
            self.keeper.arrived()
            point = trainer.point
        self.keeper.leave()
        live, slot = None, session.mesh.rank
        if point is not None:
            live = Live(point, all_tensors(session.parts, session.optimizer), self._epoch.number, slot)
        self._left = _Left(self._job, slot, session.leave(), live)

    def _give_back(self) -> None:
        for each in (self._left, self._old):
            if each is not None:
                each.close()
        self._left = self._old = None

    # Into a mesh ------------------------------------------------------------------------------------------------

    def job_in(self, epoch: Epoch) -> Config:
        """The job in the layout that a mesh has.

        Raises:
            UserError: it is none for this job, or for so many members.
        """
        return self._cfg if epoch.plan is None else relaid_for(self._cfg, epoch.plan.layout, len(epoch.members))

    def brings(self, epoch: Epoch, resumed: Path | None) -> tuple[SessionState | None, Restore | None]:
        """What this process brings to a mesh, and what makes the ranks' states one.

        Args:
            epoch: of the mesh.
            resumed: the checkpoint that the job went on from, as far as this process knows.
        """
        self._epoch, self._job = epoch, self.job_in(epoch)
        if epoch.number == 0:
            return None, None
        left, self._left = self._left, None
        slot = epoch.members.index(self._membership.number)
        folder, number = self._membership.folder, self._membership.number
        known = Known(self._begun, self._peak, self._search, resumed)
        live = left.live if left is not None else None
        self._restore = StateRestore(folder, number, epoch.members, live, known)
        if left is not None and (left.job, left.slot) == (self._job, slot):
            return left.state, self._restore
        self._old = left  # its pieces are others: they are given to whom they belong now
        return None, self._restore

    def met(self) -> None:
        """All ranks are there."""
        self._times["groups"] = time.time()

    def opened(self, session: Session) -> None:
        """The session stands, and its state is that of one step."""
        self._session, self._peak, self._search = session, session.peak, session.overlap.search
        self._give_back()

    @property
    def point(self) -> RunPoint | None:
        """How far the state of all ranks is; None: it is nobody's yet."""
        return self._restore.point if self._restore is not None else None

    @property
    def resumed(self) -> Path | None:
        """The checkpoint that the job went on from."""
        return self._restore.resumed if self._restore is not None else None

    def ready(self, trainer: Trainer, outputs: Outputs | None) -> None:
        """This rank is about to train."""
        self._trainer = trainer
        self._begun[self._epoch.number] = trainer.step
        self.keeper.tell = outputs.events.log if outputs is not None else None
        state = all_tensors(trainer.parts, trainer.optimizer)
        self.keeper.begin(trainer.mesh, self._epoch.members, state, trainer.point)
        self._times["state"] = time.time()
        if outputs is not None and self._epoch.plan is not None:
            self._tell(outputs, self._epoch.plan, trainer.step)

    def _tell(self, outputs: Outputs, plan: EpochPlan, step: int) -> None:
        began, parts = plan.seen or next(iter(self._times.values())), {}
        before = began
        for name, at in self._times.items():
            parts[name], before = round(1e3 * max(at - before, 0.0), 3), at
        total = round(1e3 * (before - began), 3)
        redone = max(0, self._restore.furthest - step) if self._restore is not None else 0
        moved = self._restore.moved if self._restore is not None else 0
        where = {"step": step, "epoch": plan.epoch, "rung": plan.rung, "layout": plan.layout}
        where |= {"from": self._from(), "moved": moved}
        slots = [
            slot for slot, number in enumerate(self._membership.members(plan.epoch - 1) or ()) if number in plan.lost
        ]
        outputs.events.log("recovered", **where, lost=slots, line=plan.line, redone=redone, ms=total, parts_ms=parts)
        if plan.rung != "grow":  # which is no fault
            outputs.sinks.add(Report.of(step, [(MTTR, total), (LOST_STEPS, redone)]))

    def _from(self) -> str:
        return "snapshots" if self.point is not None else "a checkpoint, or the first step"

    def finished(self) -> None:
        """No rank needs another one's state any more."""
        self._done = True

    def close(self) -> None:
        """At the process's end."""
        self.keeper.close()
        self._give_back()
        self._session = self._trainer = None


_LONG_S = 1e9
