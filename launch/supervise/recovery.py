"""How a node's watcher mends a fault: the lost are ended, others are put in their places, and the ranks are told who.

It is the watcher's side of `trainer.recovery`: it knows processes, slots and plans, nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from ...configs.strict_json import JsonError, expect_int, expect_object, parse_json
from ...parallel.record.diagnosis import ENDED, KILLED, OUT_OF_MEMORY, Verdict
from ...parallel.record.stand import Condition, Stand
from ...trainer.processes.watch import WatchRequest
from ...trainer.recovery.plan import EpochPlan, end_plans, publish_plan
from ...trainer.recovery.ways import Way
from ...trainer.run_folder import RunFile
from .fork_protocol import Wire, open_wire
from .ladder import Fault, Rung, Standing, climb, grown, met_anew
from .node_ranks import NodeRanks
from .watched import WatchedRank

_DYING_S = 2.0
"""For the kernel to end a killed process; one that hangs in a device is fenced by the plan all the same."""
_LEAVE_S = 2.0
"""For spares to leave at the job's end."""
_GONE = (Condition.DEAD, Condition.FAILED, Condition.LOST)
_ENDS = (KILLED, ENDED, OUT_OF_MEMORY)


class Recovery:
    """What mends faults.

    Args:
        folder: of the job on this node.
        wire: to its fork server.
        request: what is watched.
        spares: processes that are to be ready.
    """

    def __init__(self, folder: Path, wire: Wire, request: WatchRequest, spares: int) -> None:
        self._folder, self._wire, self._spares = folder, wire, spares
        self._run_dir = Path(request.run_dir)
        members = tuple(range(request.world))
        nodes, ladder = ("",) * len(members), request.ladder
        self._standing = Standing(
            0,
            members,
            nodes,
            next_number=request.world,
            rungs=ladder.rungs,
            ways=ladder.ways or (Way("", "", len(members)),),
        )
        self._grows = ladder.grow
        self._asked = False
        """Whether the ranks were asked to leave their mesh for a better one."""
        self.reachable = True
        """Whether the fork server is there."""
        wire.send(watch=True)

    @staticmethod
    def of(folder: Path, request: WatchRequest, spares: int) -> Recovery | None:
        """None: there is nobody who could fork, or the job has several nodes; then a fault ends the job."""
        if request.local < request.world:
            end_plans(folder)
            return None
        with contextlib.suppress(OSError):
            return Recovery(folder, open_wire(folder), request, spares)
        end_plans(folder)
        return None

    def fileno(self) -> int:
        """For `select`."""
        return self._wire.fileno()

    @property
    def epoch(self) -> int:
        """Of the mesh that stands, or is being made."""
        return self._standing.epoch

    @property
    def slots(self) -> int:
        """Of that mesh."""
        return len(self._standing.members)

    def look(self, ranks: NodeRanks, ready: set[int]) -> None:
        """Hears who has ended, and keeps the spares complete."""
        if self._wire.fileno() in ready and self.reachable:
            try:
                for line in self._wire.read():
                    known = expect_object(parse_json(line), "an end", ("ended", "code"))
                    ranks.codes[expect_int(known["ended"], "ended")] = expect_int(known["code"], "code", -64)
            except (ConnectionError, JsonError):
                self.reachable = False
                self._standing = replace(self._standing, starts=False)
        self._drop_ended(ranks)
        coming = frozenset(n for n in self._standing.spares if n not in ranks.spares or not ranks.spares[n].ready)
        self._standing = replace(self._standing, coming=coming)
        settled = ranks.slots and ranks.complete and not any(rank.on_its_way for rank in ranks.live())
        if settled and self._grows and (self._asked or not coming):
            self._grow(ranks)
        if settled and not self._asked and self._standing.starts and len(self._standing.spares) < self._wanted():
            number = self._standing.next_number
            self._wire.send(fork=number)
            ranks.spares_coming.add(number)
            spares = {**self._standing.spares, number: ""}
            self._standing = replace(self._standing, spares=spares, next_number=number + 1)

    def _wanted(self) -> int:
        """Spares that are to be there: those of the job, and what its own layout needs beyond the mesh's."""
        missing = self._standing.ways[0].members - len(self._standing.members) if self._grows else 0
        return self._spares + max(0, missing)

    def _grow(self, ranks: NodeRanks) -> None:
        """Has the ranks leave their mesh at the end of a step, where others are ready to join them; and join."""
        rung = grown(self._standing)
        if not self._asked:
            self._asked = rung is not None
            for rank in ranks.live() if rung is not None else ():
                rank.ask_to_leave(self.epoch + 1)
        elif sum(rank.ready for rank in ranks.live()) == self.slots:
            rung = rung or met_anew(self._standing)
            assert rung.plan is not None
            print(f"{rung.plan.line}; {_words(rung.plan)}", file=sys.stderr, flush=True)
            self._publish(rung.plan, rung, ranks)

    def _drop_ended(self, ranks: NodeRanks) -> None:
        """Counts no longer on spares that have ended."""
        ended = [number for number in self._standing.spares if number in ranks.codes]
        if not ended:
            return
        if not all(number in ranks.spares for number in ended):
            self._standing = replace(self._standing, starts=False)  # others would not begin either
        ranks.spares_coming -= set(ended)
        ranks.tidy([ranks.spares.pop(number) for number in ended if number in ranks.spares])
        spares = {number: node for number, node in self._standing.spares.items() if number not in ended}
        self._standing = replace(self._standing, spares=spares)

    # After a verdict --------------------------------------------------------------------------------------------

    def mends(self, verdict: Verdict, stands: dict[int, Stand], ranks: NodeRanks) -> bool:
        """Has the job go on after a fault; whether it does.

        Args:
            verdict: whom the watcher blames.
            stands: where all ranks stood.
            ranks: of this node.
        """
        if not self.reachable:
            return False
        if verdict.kind in _ENDS and any(rank.left and not rank.failed for rank in ranks.slots.values()):
            for slot in verdict.ranks:  # all that the job was for is done
                if slot in ranks.slots:
                    ranks.slots[slot].missed_by_nobody = True
                self._wire.send(missed=self._standing.members[slot])
            return True
        gone = {slot for slot, stand in stands.items() if stand.condition in _GONE}
        gone |= {slot for slot, condition in ranks.conditions().items() if condition in _GONE}
        own = {slot: stand.line for slot, stand in stands.items() if stand.condition is Condition.FAILED}
        user = any(rank.by_user for rank in ranks.slots.values())
        step = max((stand.at[0] for stand in stands.values()), default=0)
        rung = climb(self._standing, Fault(verdict, gone, own, step, user))
        if rung.plan is None:
            print(f"a fault that is not mended: {rung.why}", file=sys.stderr, flush=True)
            return False
        plan = rung.plan
        lost = [rank for rank in ranks.slots.values() if rank.number in plan.lost]
        _kill(lost)
        for number in rung.started:
            self._wire.send(fork=number)
        _wait_for_ends(lost)
        self._publish(plan, rung, ranks)
        self._tell(verdict, plan)
        ranks.tidy(lost)
        for rank in lost:
            rank.close()
            (self._folder / f"failure.{rank.number}").unlink(missing_ok=True)
        return True

    def _publish(self, plan: EpochPlan, rung: Rung, ranks: NodeRanks) -> None:
        """Makes a plan hold."""
        self._wire.send(plan=list(plan.members))
        publish_plan(self._folder, plan)
        self._standing, self._asked = rung.standing, False
        ranks.follow(plan.epoch, dict(enumerate(plan.members)), plan.spares, time.monotonic())

    def _tell(self, verdict: Verdict, plan: EpochPlan) -> None:
        """Says what happened, and what is done about it."""
        print(f"fault: {verdict.line}; {_words(plan)}", file=sys.stderr, flush=True)
        about = {"kind": verdict.kind, "ranks": list(verdict.ranks), "lost": list(plan.lost), "line": verdict.line}
        event = {"time": verdict.at, "event": "fault", **about, "epoch": plan.epoch, "rung": plan.rung}
        event |= {"layout": plan.layout} if plan.layout else {}
        with contextlib.suppress(OSError), open(self._run_dir / RunFile.EVENTS, "ab", buffering=0) as file:
            file.write(json.dumps(event).encode() + b"\n")

    def close(self, ranks: NodeRanks) -> None:
        """At the job's end, good or bad: whoever waits for a plan leaves, and a slot ends as its process does."""
        with contextlib.suppress(OSError):
            end_plans(self._folder)
        self._wire.send(end=True)
        self._wire.close()
        spares = list(ranks.spares.values())
        _wait_for_ends(spares, _LEAVE_S)
        # Whoever was first on the node, and would have kept the records of all, may be among the lost.
        ranks.tidy([*spares, *(rank for rank in ranks.slots.values() if rank.has_ended())])


def _words(plan: EpochPlan) -> str:
    """What is done, for a person."""
    layout = f" of {plan.layout}" if plan.layout else ""
    return f"{plan.rung}: the job goes on in mesh {plan.epoch}{layout}"


def _kill(lost: list[WatchedRank]) -> None:
    for rank in lost:
        if not rank.has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.header.pid, signal.SIGKILL)  # of a stopped process too


def _wait_for_ends(ranks: list[WatchedRank], seconds: float = _DYING_S) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(rank.has_ended() for rank in ranks):
        time.sleep(0.001)
