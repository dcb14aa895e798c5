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
from typing import Any

from ...configs.strict_json import JsonError, expect_list, read_bytes
from ...parallel.record.diagnosis import ENDED, FAILED, HANG, KILLED, LINK, LOST_NODE, OUT_OF_MEMORY, Verdict, diagnose
from ...parallel.record.files import record_folder
from ...parallel.record.stand import Condition, Stand
from ...parallel.record.stand_text import dump_stand, load_stand
from ...trainer.processes.orphans import signal_self_when_orphaned
from ...trainer.processes.watch import WatchRequest
from ...trainer.run_folder import RunFile
from .node_ranks import NodeRanks
from .recovery import Recovery
from .watch_link import End, WatchLink
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
_ANSWER_S = 1.0
"""For the other nodes to say where their ranks stand."""
_ARRIVE_S = 60.0
"""Without any rank: they had ended before there was a watcher."""


class Watcher:
    """Watches the ranks of one node.

    Args:
        request: what to watch.
        tell: given the verdict, once.
        recovery: what mends a fault; None: it ends the job.
    """

    def __init__(
        self, request: WatchRequest, tell: Callable[[Verdict], object], recovery: Recovery | None = None
    ) -> None:
        self.request, self._tell = request, tell
        self.run_dir = Path(request.run_dir)
        self._host = socket.gethostname()
        self.ranks = NodeRanks(request, self._host)
        self._recovery = recovery
        self._not_before = 0.0
        self._lost_at = 0.0
        self.verdict: Verdict | None = None
        self._deadline = time.monotonic() + _ARRIVE_S
        self._seen = 0.0
        """When a rank was seen to be dead (Unix time)."""
        self._link: WatchLink | None = None
        self._answers: dict[int, Stand] = {}
        self._asked_at = self._not_again = self._told_until = 0.0
        self._impatient = False

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
                self.ranks.gather(now)
                self.ranks.look(ready, now)
                if self._recovery is not None:
                    self._recovery.look(self.ranks, ready)
                self._judge(now)
                self._converse(ready, now)
                if self.verdict is not None:
                    self._end()
                    return 1
            return 0
        finally:
            if self._recovery is not None:
                self._recovery.close(self.ranks)
            if self._link is not None:
                self._link.close()

    def _over(self) -> bool:
        if not self.ranks.slots and not self.ranks.coming:
            return time.monotonic() > self._deadline
        return not self.ranks.live() and not self.ranks.coming

    def _sleep(self) -> set[int]:
        """Waits for the next look, or for something to happen; the descriptors that are ready."""
        poll = select.poll()
        self.ranks.register(poll)
        if self._recovery is not None and self._recovery.reachable:
            poll.register(self._recovery, select.POLLIN)
        for end in self._link.sockets() if self._link is not None else ():
            poll.register(end, select.POLLIN)
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
            self._judged(verdict, self.ranks.stands(now))
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
        link = self._link
        if link is None:
            self._decide(self.ranks.stands(now), impatient)
        elif link.is_home:
            self._ask(now, impatient)
        elif now > self._told_until:
            self._told_until = now + _AGAIN_S
            link.tell(trouble=impatient)

    def _decide(self, stands: dict[int, Stand], impatient: bool) -> None:
        seen = self._seen or time.time()
        places = read_places(self.run_dir, self._recovery.slots if self._recovery is not None else self.request.world)
        verdict = diagnose(stands, places, impatient=impatient)
        if verdict is None:
            return
        if self._link is None and verdict.kind not in (KILLED, OUT_OF_MEMORY, ENDED, FAILED, LOST_NODE):
            stands = still_standing(self.ranks.with_stacks(stands), self.ranks.slots)
            verdict = diagnose(stands, places, impatient=impatient)
        if verdict is not None:
            self._judged(replace(verdict, at=seen), stands)

    def _judged(self, verdict: Verdict, stands: dict[int, Stand]) -> None:
        self._abort()
        if self._recovery is not None and self._recovery.mends(verdict, stands, self.ranks):
            self._seen = self._lost_at = self._not_before = 0.0
            return
        self.verdict = verdict
        if self._link is not None and self._link.is_home:
            self._link.tell(verdict=self.verdict.as_dict())
        if self._link is None or self._link.is_home:
            self._publish(self.verdict)

    def _abort(self) -> None:
        epoch = self._recovery.epoch if self._recovery is not None else 0
        for rank in self.ranks.live():
            rank.abort(epoch)

    # Several nodes ----------------------------------------------------------------------------------------------

    def _ask(self, now: float, impatient: bool) -> None:
        """Asks the other nodes where their ranks stand; what they say is judged in `_converse`."""
        self._impatient = self._impatient or impatient
        if self._link is not None and not self._asked_at and now > self._not_again:
            self._asked_at, self._answers = now, {}
            self._link.tell(ask=not self._seen)

    def _converse(self, ready: set[int], now: float) -> None:
        """Hears the other nodes, and answers."""
        if self._link is None:
            self._meet()
            return
        for end, message in self._link.read(ready):
            with contextlib.suppress(JsonError):
                self._hear(end, message, now)
        for end in self._link.lost:
            if not self._link.is_home:
                line = "the first node's watcher cannot be reached any more: that node is down, or the way to it"
                self._judged(Verdict(LOST_NODE, (0,), line, at=time.time()), {})
                return
            self._ask(now, impatient=False)
            self._answers |= {rank: Stand(rank, end.host, condition=Condition.GONE) for rank in end.ranks}
        complete = len(self._answers) + len(self.ranks.slots) >= self.request.world
        if self._asked_at and (complete or now - self._asked_at > _ANSWER_S):
            own = self.ranks.stands(now)
            own = own if self._seen else self.ranks.with_stacks(own)
            impatient, self._impatient = self._impatient, False
            self._asked_at, self._not_again = 0.0, now + _AGAIN_S
            self._decide({**own, **self._answers}, impatient)

    def _hear(self, end: End, message: dict[str, Any], now: float) -> None:
        link = self._link
        if link is None or self.verdict is not None:
            return
        if link.is_home and "trouble" in message:
            self._ask(now, message["trouble"] is True)
        elif link.is_home and "stands" in message:
            stands = [load_stand(each) for each in expect_list(message["stands"], "stands")]
            self._answers |= {stand.rank: stand for stand in stands if stand.rank in end.ranks}
        elif "ask" in message:
            stands = self.ranks.stands(now)
            stands = self.ranks.with_stacks(stands) if message["ask"] is True else stands
            end.send(stands=[dump_stand(stand) for stand in stands.values()])
        elif "verdict" in message:
            self._judged(Verdict.load(message["verdict"]), {})

    def _meet(self) -> None:
        """Comes together with the other nodes' watchers, once all ranks of this node are there."""
        request = self.request
        if not request.token or len(self.ranks.slots) < request.local:
            return
        host, _, port = request.home.rpartition(":")
        home = (host, int(port)) if request.home else None
        listener = socket.socket(fileno=request.listener) if request.listener >= 0 else None
        ranks = sorted(self.ranks.slots)
        with contextlib.suppress(OSError):
            self._link = WatchLink(request.token, listener=listener, home=home, host=self._host, ranks=ranks)

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
        return Watcher(WatchRequest.load(sys.stdin.buffer.read()), _print).run()
    folder = Path(argument)
    signal_self_when_orphaned(signal.SIGKILL)  # the launcher's ranks say themselves what they lost

    def tell(verdict: Verdict) -> None:
        publish_text(folder / VERDICT, json.dumps(verdict.as_dict()))
        if aloud:
            _print(verdict)

    while not (folder / WATCH).exists():
        if not folder.exists():
            return 0
        time.sleep(LOOK_S)
    request = WatchRequest.load(read_bytes(folder / WATCH))
    recovery = Recovery.of(folder, request, spares) if spares is not None else None
    return Watcher(request, tell, recovery).run()


def _print(verdict: Verdict) -> None:
    if verdict.kind != FAILED:  # which the rank itself says, with its traceback
        print("\n".join((f"error: {verdict.line}", *verdict.details)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # it ends with its ranks, and not before
    with contextlib.suppress(OSError):
        os.nice(-10)  # where that is allowed: it needs little, but at once, and the ranks take all cores
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None, aloud=len(sys.argv) > 3))
