"""Stand-ins for ranks whose faults are mended: ``python -m tests.launch.supervise.members FOLDER``.

They do what a rank does towards its node: leave their process id, show their life in a ring, wait for plans. A step is
done when all slots of the mesh have come to it; whoever leaves a mesh writes down the step that it was at.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from pentad.launch.supervise.worker_files import WATCH, publish_text
from pentad.parallel.comm.process_ids import ProcessId
from pentad.parallel.record.ring import create
from pentad.parallel.record.vitals import Heart
from pentad.trainer.processes.failure import failure_of, write_failure
from pentad.trainer.processes.leaving import leave
from pentad.trainer.processes.orphans import signal_self_when_orphaned
from pentad.trainer.processes.signals import StopRequest
from pentad.trainer.processes.watch import WatchRequest
from pentad.trainer.recovery.plan import Membership
from pentad.trainer.recovery.ways import Ladder

_STEP_S = 0.02
_ALIVE_S, _HANG_S, _PAUSE_S = 1.5, 4.0, 20.0


class Member:
    """One process of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.left_in_order = False
        """Whether the last mesh was left for one that others join."""
        self.membership = Membership(folder, self.number, self.world)
        self.stop = StopRequest().listen()
        stem = f"members-{folder.name}-{os.stat(folder).st_ino}"
        self.recorder = create(stem, rank=self.number, world=self.world, entries=64)
        self.vitals = self.recorder.vitals
        self.heart = Heart(self.vitals)
        publish_text(folder / f"pid.{self.number}", json.dumps(asdict(ProcessId.current())))
        if self.number == 0:
            (folder / "run" / "record").mkdir(parents=True)
            limits, file = (_ALIVE_S, _HANG_S, _PAUSE_S), folder / "ladder"
            ladder = Ladder.load(json.loads(file.read_text())) if file.exists() else Ladder()
            request = WatchRequest(stem, str(folder / "run"), self.world, self.world, *limits, ladder=ladder)
            publish_text(folder / WATCH, request.dump())

    def run(self) -> int:
        """From the first mesh to the last."""
        epoch, members = 0, tuple(range(self.world))
        spares: tuple[int, ...] = ()
        while True:
            if self.number in members:
                if self._in_mesh(epoch, members):
                    break
                if self.stop.requested:
                    return 1
                if not self.left_in_order:
                    self.vitals.out()
            elif epoch and self.number < self.world and self.number not in spares:
                return 0
            if self.number not in members or self.left_in_order:
                self.vitals.ready()
                (self.folder / f"ready.{self.number}").touch()
            plan = self.membership.wait(epoch, 60, lambda: self.stop.requested)
            if plan is None:
                return 0 if self.number not in members else 1
            epoch, members, spares = plan.epoch, plan.members, plan.spares
            if self.number in members:
                self.vitals.goes_on()
        self.vitals.left()
        self.recorder.close()
        return 0

    def _in_mesh(self, epoch: int, members: tuple[int, ...]) -> bool:
        """Does steps until the end (True), a fault or a change of meshes (False)."""
        self.left_in_order = False
        aborted, slot = threading.Event(), members.index(self.number)
        self.recorder.epoch = epoch
        self.vitals.listen(epoch, aborted.set, lambda: None)
        self.vitals.enter("load")
        done = self._newest()
        if not self._meet(f"open.{epoch}", slot, len(members), aborted):
            return False
        (self.folder / f"in.{epoch}.{slot}").write_text(f"{self.number} {time.time()}")
        self.vitals.enter("step")
        for step in itertools.count(done):
            if step >= self._last():
                break
            self.recorder.step = step
            with self.recorder.span(self.recorder.intern("F")):
                time.sleep(_STEP_S)
            self._act(step, slot)
            wish = self.folder / f"leave.{epoch}.{step}"
            if self.vitals.to_leave:
                wish.touch()
            if not self._meet(f"step.{epoch}.{step}", slot, len(members), aborted):
                return False
            (self.folder / "stepped" / str(step + 1)).touch()
            if wish.exists():
                self.left_in_order = True
                return False
        return True

    def _act(self, step: int, slot: int) -> None:
        """Fails where a file says so."""
        for how in ("once", "always"):
            file = self.folder / f"fail.{how}.{slot}.{step}"
            if file.exists():
                if how == "once":
                    file.unlink()
                raise ArithmeticError(f"bad number in step {step}")

    def _last(self) -> float:
        """How many steps there are to be, once somebody has said so."""
        file = self.folder / "steps"
        return int(file.read_text()) if file.exists() else math.inf

    def _newest(self) -> int:
        folder = self.folder / "stepped"
        folder.mkdir(exist_ok=True)
        return max((int(file.name) for file in folder.iterdir()), default=0)

    def _meet(self, name: str, slot: int, world: int, aborted: threading.Event) -> bool:
        (self.folder / "met").mkdir(exist_ok=True)
        (self.folder / "met" / f"{name}.{slot}").touch()
        while not all((self.folder / "met" / f"{name}.{other}").exists() for other in range(world)):
            if aborted.wait(0.002) or self.stop.requested:
                return False
        return not aborted.is_set()


def main() -> int:
    """A process of the job."""
    signal_self_when_orphaned(15)  # pyright: ignore[reportArgumentType]
    member = Member(Path(sys.argv[1]))
    try:
        return member.run()
    except ArithmeticError as error:
        failure = failure_of(error, rank=member.number, world=member.world)
        write_failure(member.folder / "run", failure)
        publish_text(member.folder / f"failure.{member.number}", json.dumps(failure.as_dict()))
        member.vitals.failed()
        return 1


if __name__ == "__main__":
    leave(main())
