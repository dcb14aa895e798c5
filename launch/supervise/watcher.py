"""The watcher of a node: sees ranks die, hang or go astray, says which and why, and ends the job at once.

    python -m pentad.launch.supervise.watcher FOLDER [SPARES [aloud]] | -

FOLDER is that of a launcher, in which the node's first rank leaves the request; with - the request comes from standard
input, of a rank that somebody else's launcher started. The process never imports torch: it must be there early, small,
and able to judge ranks whose interpreter is held or whose process is stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...configs.strict_json import read_bytes
from ...parallel.record.diagnosis import ENDED, FAILED, HANG, KILLED, LINK, LOST_NODE, OUT_OF_MEMORY, Verdict, diagnose
from ...parallel.record.files import record_folder
from ...parallel.record.stand import Condition, Stand
from ...trainer.processes.orphans import signal_self_when_orphaned
from ...trainer.processes.watch import LISTENS, WatchRequest
from ...trainer.run_folder import RunFile
from .node_ranks import NodeRanks
from .nodes.conversation import Conversation
from .recovery import Recovery
from .watched import still_standing
from .worker_files import VERDICT, WATCH, publish_text, read_places

LOOK_S = 0.04
"""Between two looks at the signs of life; deaths wake it at once."""
_ABSENT_S = 1.0
"""A look that comes so much too late: somebody has stopped the whole job, or the machine."""
_MOMENT_S = 0.25
"""From the first suspicion of a rank to a verdict: its threads are measured, and its silence is confirmed."""
_AGAIN_S = 0.5
"""After a suspicion that was none."""
_CAUSE_S = 0.75
"""After a rank has only lost another: for the cause to show itself."""
_LEAVE_S, _END_S = 5.0, 20.0
"""After a verdict, for ranks to leave, and for those that have left to end; then they are killed."""
_ARRIVE_S = 60.0
"""Without any rank: they had ended before there was a watcher."""


class Watcher:
    """Watches the ranks of one node.

    Args:
        request: what to watch.
        tell: given the verdict, once.
        recovery: what mends a fault; None: it ends the job.
        listener: where the watchers of other nodes call; None: nobody does.
    """

    def __init__(
        self,
        request: WatchRequest,
        tell: Callable[[Verdict], object],
        recovery: Recovery | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self.request, self._tell = request, tell
        self.run_dir = Path(request.run_dir)
        self._host = socket.gethostname()
        self.ranks = NodeRanks(request, self._host, recovery.folder if recovery is not None else None)
        self._recovery = recovery
        self._not_before = 0.0
        self._lost_at = self._ended = 0.0
        self.verdict: Verdict | None = None
        self._deadline = time.monotonic() + _ARRIVE_S
        self._seen = 0.0
        """When a rank was seen to be dead (Unix time)."""
        self._others = Conversation(
            request,
            self.ranks,
            recovery,
            listener,
            decide=self._decide,
            judged=lambda verdict, mend: self._judged(verdict, self.ranks.stands(time.monotonic()), mend=mend),
            mended=self._mended,
            hurried=lambda: self._seen > 0,
        )

    def run(self) -> int:
        """Watches until all ranks have ended; 0, or 1 after a verdict."""
        try:
            while not self._over():
                slept = time.monotonic()
                ready = self._sleep()
                now = time.monotonic()
                if now - slept > _ABSENT_S:
                    for rank in self.ranks.live():
                        rank.excuse(now - slept)
                    self._others.excuse(now - slept)
                self.ranks.gather(now)
                self.ranks.look(ready, now)
                if self._recovery is not None:
                    self._recovery.look(self.ranks, ready)
                if not self._others.waits:
                    self._judge(now)
                self._others.converse(ready, now)
                self._others.look()
                if self.verdict is not None:
                    self._end()
                    return 1
            return 0
        finally:
            if self._recovery is not None:
                self._recovery.close(self.ranks)
            self._others.close()

    def _over(self) -> bool:
        if not self.ranks.slots and not self.ranks.coming:
            left_out = self._recovery is not None and self._recovery.epoch > 0
            return left_out or time.monotonic() > self._deadline
        if self.ranks.live() or self.ranks.coming:
            self._ended = 0.0
            return False
        self._ended = self._ended or time.monotonic()
        well = set(self.ranks.conditions().values()) <= {Condition.DONE}
        # Of what has happened to a node's last rank others may still be asked, and it may be mended.
        return well or not self._others.several or time.monotonic() - self._ended > _LEAVE_S

    def _sleep(self) -> set[int]:
        """Waits for the next look, or for something to happen; the descriptors that are ready."""
        poll = select.poll()
        self.ranks.register(poll)
        if self._recovery is not None and self._recovery.reachable:
            poll.register(self._recovery, select.POLLIN)
        for connection in self._others.sockets():
            poll.register(connection, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(LOOK_S * 1000)}

    # What is wrong ----------------------------------------------------------------------------------------------

    def _judge(self, now: float) -> None:
        conditions = self.ranks.conditions()
        broken = {c for c in conditions.values() if c not in (Condition.LOST, Condition.DONE)}
        if broken:
            self._suspect(now)
            return
        if Condition.LOST in conditions.values():
            self._lost_at = self._lost_at or now
            if now - self._lost_at > _CAUSE_S / 5:
                self._suspect(now, impatient=now - self._lost_at > _CAUSE_S)
            return
        if self._recovery is not None and (verdict := self._between_meshes(now)) is not None:
            if self._others.is_home:
                self._judged(verdict, self.ranks.stands(now))
            else:
                self._others.blame(verdict)
            return
        late = [rank for rank in self.ranks.live() if rank.late(now) and not rank.done]
        if late and now > self._not_before and not any(rank.unsure for rank in late):
            if not self._not_before:  # the CPU time of threads is judged over a moment
                for rank in self.ranks.live():
                    rank.sample(now)
                self._not_before = now + _MOMENT_S
                return
            self._not_before = now + _AGAIN_S
            self._suspect(now)
        elif not late:
            self._not_before = 0.0

    def _between_meshes(self, now: float) -> Verdict | None:
        """What is wrong with ranks that are on their way from one mesh to the next."""
        stay = tuple(rank.slot for rank in self.ranks.live() if rank.stays(now))
        if stay:
            line = f"rank {stay[0]} was told to leave, and does not come out of what it does"
            return Verdict(HANG, stay, line, at=time.time())
        alone = tuple(rank.slot for rank in self.ranks.live() if rank.alone_s(now) > _CAUSE_S)
        if alone:
            line = f"rank {alone[0]} lost the connection to another rank, and all ranks are there"
            return Verdict(LINK, alone, line, at=time.time() - _CAUSE_S)
        return None

    def _suspect(self, now: float, *, impatient: bool = False) -> None:
        """Something is wrong here: finds out what, with the other nodes where there are some."""
        if Condition.DEAD in self.ranks.conditions().values():
            self._seen = self._seen or time.time()
            self._abort()  # nothing can change the verdict, only its words are missing
        if self._others.several:
            self._others.suspect(now, impatient=impatient)
        else:
            self._decide(self.ranks.stands(now), impatient, False)

    def _decide(self, stands: dict[int, Stand], impatient: bool, user: bool) -> None:
        seen = self._seen or time.time()
        places = read_places(self.run_dir, self._recovery.slots if self._recovery is not None else self.request.world)
        verdict = diagnose(stands, places, impatient=impatient)
        if verdict is None:
            return
        if not self._others.several and verdict.kind not in (KILLED, OUT_OF_MEMORY, ENDED, FAILED, LOST_NODE):
            stands = still_standing(self.ranks.with_stacks(stands), self.ranks.slots)
            verdict = diagnose(stands, places, impatient=impatient)
        if verdict is not None:
            self._judged(replace(verdict, at=seen), stands, user=user)

    def _judged(self, verdict: Verdict, stands: dict[int, Stand], *, mend: bool = True, user: bool = False) -> None:
        """After a verdict the job goes on, or ends.

        Args:
            verdict: whom the watchers blame.
            stands: where the ranks stood.
            mend: whether to try.
            user: whether some error is a mistake of the user's.
        """
        self._abort()
        decider = self._others.decider if self._others.is_home else None
        user = user or any(rank.by_user for rank in self.ranks.slots.values())
        if mend and decider is not None and decider.mends(verdict, stands, self.ranks, self._others.link, user=user):
            self._mended()
            return
        self.verdict = verdict
        self._others.tell_verdict(verdict)
        if mend and self._others.is_home:
            self._publish(self.verdict)
        elif not verdict.ranks:
            self._tell(verdict)  # the job may go on elsewhere, and the run is its

    def _mended(self) -> None:
        """The job goes on."""
        self._seen = self._lost_at = self._not_before = 0.0

    def _abort(self) -> None:
        self.ranks.abort(self._recovery.epoch if self._recovery is not None else 0)

    # After a verdict --------------------------------------------------------------------------------------------

    def _publish(self, verdict: Verdict) -> None:
        with contextlib.suppress(OSError):
            folder = record_folder(self.run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            publish_text(folder / VERDICT, json.dumps(verdict.as_dict(), indent=1) + "\n")
            # Without the step, which was not done: a run that failed in its first one has used nothing of its folder.
            about = {key: value for key, value in verdict.as_dict().items() if key not in ("step", "at")}
            event = {"time": verdict.at, "event": "verdict", **about}
            with open(self.run_dir / RunFile.EVENTS, "ab", buffering=0) as file:
                file.write(json.dumps(event).encode() + b"\n")
        self._tell(verdict)

    def _end(self) -> None:
        """Lets the ranks leave, and kills those that cannot."""
        begin = time.monotonic()
        verdict = self.verdict
        hopeless = set(verdict.ranks) if verdict is not None and verdict.kind != FAILED else set()
        while staying := [rank for rank in self.ranks.live() if not rank.has_ended()]:
            since = time.monotonic() - begin
            waited_for = [rank for rank in staying if rank.slot not in hopeless and not rank.left]
            for rank in staying:
                allowed = _END_S if rank.left else _LEAVE_S
                if rank.slot in hopeless and not waited_for:
                    allowed = 0.0
                if since > allowed:
                    with contextlib.suppress(OSError):
                        os.kill(rank.header.pid, signal.SIGKILL)
            time.sleep(LOOK_S)
        self.ranks.tidy(list(self.ranks.slots.values()))


def main(argument: str, spares: int | None = None, *, aloud: bool = False) -> int:
    """Watches what the first argument says; with `spares`, mends faults and keeps so many processes ready; `aloud`: it
    prints the verdict itself."""
    if argument == "-":
        request = WatchRequest.load(sys.stdin.buffer.read())
        listener = socket.socket(fileno=request.listener) if request.listener >= 0 else None
        return Watcher(request, _print, None, listener).run()
    folder = Path(argument)
    signal_self_when_orphaned(signal.SIGKILL)  # the launcher's ranks say themselves what they lost

    def tell(verdict: Verdict) -> None:
        publish_text(folder / VERDICT, json.dumps(verdict.as_dict()))
        if aloud:
            _print(verdict)

    listener = socket.create_server(("", 0), backlog=1024) if aloud else None
    if listener is not None:
        publish_text(folder / LISTENS, str(listener.getsockname()[1]))
    while not (folder / WATCH).exists():
        if not folder.exists():
            return 0
        time.sleep(LOOK_S)
    request = WatchRequest.load(read_bytes(folder / WATCH))
    recovery = Recovery.of(folder, request, spares) if spares is not None else None
    return Watcher(request, tell, recovery, listener).run()


def _print(verdict: Verdict) -> None:
    if verdict.kind != FAILED:  # which the rank itself says, with its traceback
        print("\n".join((f"error: {verdict.line}", *verdict.details)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # it ends with its ranks, and not before
    with contextlib.suppress(OSError):
        os.nice(-10)  # where that is allowed: it needs little, but at once, and the ranks take all cores
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None, aloud=len(sys.argv) > 3))
