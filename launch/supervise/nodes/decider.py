"""What the one watcher that decides does: after a verdict it climbs the ladder, and brings all nodes to the next plan.

    verdict ─ climb ─┬─ prepare ──> every node kills its lost, and starts who is missing ──┐ all say: gone
                     └─ a store, where the one before is lost                              │
    ranks meet anew <── every node shows its ranks the plan <── publish <── claim ─────────┘

The plan of an epoch is claimed by a file in the run's folder, which all nodes have, before anybody sees it. So where
the way between two nodes breaks, and each takes the other for lost, only one of them goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....configs.strict_json import expect_int, expect_list, expect_object
from ....parallel.record.diagnosis import ENDED, KILLED, LINK, LOST_NODE, OUT_OF_MEMORY, Verdict
from ....parallel.record.files import record_folder
from ....parallel.record.stand import Condition, Stand
from ....trainer.recovery.plan import EpochPlan
from ....trainer.run_folder import RunFile
from ..ladder import Fault, Rung, climb, grown, met_anew
from ..node_ranks import NodeRanks
from ..recovery import GONE, Recovery
from .standing_text import Prepared
from .watch_link import End, WatchLink

_ENDS = (KILLED, ENDED, OUT_OF_MEMORY, LOST_NODE)
_BLAMED = 2
"""Faults of a node's processes with which the node is left out, where others have enough spares."""
_ANSWER_S = 3.0
"""For the other nodes to have made ready for a plan; one that has not is judged after it."""


@dataclass(frozen=True)
class NodeReport:
    """What a node says of its processes.

    Args:
        began: slots that it had at first.
        ready: numbers of those that are ready to join a mesh.
        starts: whether new processes come up.
        left: how many of its ranks have left the mesh, as they were asked.
    """

    began: int
    ready: frozenset[int]
    starts: bool
    left: int

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "ready": sorted(self.ready)}

    @staticmethod
    def load(value: object) -> NodeReport:
        """What `dump` made, from JSON.

        Raises:
            JsonError: something else.
        """
        known = expect_object(value, "a report", NodeReport.__dataclass_fields__)
        ready = frozenset(expect_int(each, "a spare", 0) for each in expect_list(known["ready"], "ready"))
        began, left = (expect_int(known[name], name, 0) for name in ("began", "left"))
        return NodeReport(began, ready, known["starts"] is True, left)


def report_of(ranks: NodeRanks, recovery: Recovery) -> NodeReport:
    """What a node has to say."""
    ready = frozenset(number for number, spare in ranks.spares.items() if spare.ready)
    return NodeReport(recovery.began, ready, recovery.starts, sum(rank.ready for rank in ranks.live()))


class Decider:
    """Decides for all nodes of a job.

    Args:
        recovery: of this node.
        token: that the watchers of several nodes share; empty: there is one.
        host: by what the others reach this node.
    """

    def __init__(self, recovery: Recovery, token: str = "", host: str = "") -> None:
        self._recovery, self._host = recovery, host
        self._store = recovery.last_store
        """Where the ranks meet, HOST:PORT; empty: where the job began to."""
        self._claims = hashlib.sha256(token.encode()).hexdigest()[:16] if token else ""
        self._reports: dict[str, NodeReport] = {}
        self._lost_nodes: set[str] = set()
        self._asked = 0
        """The epoch for which the ranks were asked to leave the one before."""
        self._blamed: dict[str, int] = {}
        """Faults of each node's processes."""
        self._before: EpochPlan | None = None
        self._waiting: set[str] = set()
        """Nodes that have not made ready yet."""
        self._until = 0.0
        self._verdict: Verdict | None = None
        self.lacks_store = False
        """Whether a store is to be made on this node, for the one that there was is lost."""
        self.cut_off = ""
        """Why this node must not go on."""

    # Spares, and growing ----------------------------------------------------------------------------------------

    def hear(self, node: str, about: NodeReport, ended: list[int]) -> None:
        """What a node says of its processes; `ended`: numbers of spares that are gone."""
        self._reports[node] = about
        self._without(ended)

    def keep(self, ranks: NodeRanks, link: WatchLink | None) -> None:
        """Keeps the spares of all nodes complete, and has the job grow where enough of them are ready."""
        recovery, ended = self._recovery, self._recovery.ended_spares
        recovery.ended_spares = []
        self.hear(recovery.node, report_of(ranks, recovery), ended)
        there = frozenset().union(*(report.ready for report in self._reports.values()))
        coming = frozenset(number for number in recovery.standing.spares if number not in there)
        starts = all(report.starts for report in self._reports.values())
        recovery.standing = replace(recovery.standing, coming=coming, starts=starts)
        settled = ranks.slots and ranks.complete and not any(rank.on_its_way for rank in ranks.live())
        if not settled or recovery.prepared is not None:
            return
        asked = self._asked > recovery.epoch
        if recovery.grows and (asked or not coming) and not self._grow(ranks, link):
            return
        for node, report in self._reports.items():
            if report.starts:
                self._complete(node, report, ranks, link)

    def _complete(self, node: str, report: NodeReport, ranks: NodeRanks, link: WatchLink | None) -> None:
        """Has a process started on a node if there are too few."""
        recovery, standing = self._recovery, self._recovery.standing
        missing = report.began - sum(each == node for each in standing.nodes) if recovery.grows else 0
        if sum(each == node for each in standing.spares.values()) >= recovery.spares + max(0, missing):
            return
        number = standing.next_number
        if node == recovery.node:
            recovery.fork_spare(number, ranks)
        for end in link.members if link is not None else ():
            if end.known and end.about.node == node:
                end.send(fork=number)
        recovery.standing = replace(standing, spares={**standing.spares, number: node}, next_number=number + 1)

    def _grow(self, ranks: NodeRanks, link: WatchLink | None) -> bool:
        """Has the ranks leave their mesh at the end of a step, where others are ready to join them, and join; whether
        there is nothing to be done of that kind."""
        recovery = self._recovery
        rung, epoch = grown(recovery.standing), recovery.epoch + 1
        if self._asked < epoch:
            if rung is None:
                return True
            self._asked = epoch
            for rank in ranks.live():
                rank.ask_to_leave(epoch)
            if link is not None:
                link.tell(leave=epoch)
        elif sum(report.left for report in self._reports.values()) == recovery.slots:
            self._begin(rung or met_anew(recovery.standing), None, ranks, link)
        return False

    def _without(self, ended: list[int]) -> None:
        """Counts no longer on spares that have ended."""
        if ended:
            standing = self._recovery.standing
            spares = {number: where for number, where in standing.spares.items() if number not in ended}
            self._recovery.standing = replace(standing, spares=spares)

    def without_node(self, node: str) -> None:
        """Counts no longer on a node that is lost."""
        self._lost_nodes.add(node)
        self._reports.pop(node, None)
        self._waiting.discard(node)
        spares = self._recovery.standing.spares
        self._without([number for number, where in spares.items() if where == node])

    # After a verdict --------------------------------------------------------------------------------------------

    def mends(
        self,
        verdict: Verdict,
        stands: dict[int, Stand],
        ranks: NodeRanks,
        link: WatchLink | None,
        *,
        user: bool,
    ) -> bool:
        """Has the job go on after a fault; whether it does.

        Args:
            verdict: whom the watchers blame.
            stands: where all ranks stood.
            ranks: of this node.
            link: to the other nodes.
            user: whether an error is a mistake of the user's.
        """
        recovery = self._recovery
        if not recovery.reachable or "" in recovery.standing.nodes:
            return False
        if verdict.kind in _ENDS and any(rank.left and not rank.failed for rank in ranks.slots.values()):
            recovery.miss(verdict.ranks, ranks)
            if link is not None:
                link.tell(missed=list(verdict.ranks))
            return True
        gone = {slot for slot, stand in stands.items() if stand.condition in GONE}
        gone |= {slot for slot, condition in ranks.conditions().items() if condition in GONE}
        own = {slot: stand.line for slot, stand in stands.items() if stand.condition is Condition.FAILED}
        step = max((stand.at[0] for stand in stands.values()), default=0)
        found = Fault(verdict, gone, own, step, user)
        rung = self._without_blamed(found, link) or climb(recovery.standing, found)
        if rung.plan is None:
            print(f"a fault that is not mended: {rung.why}", file=sys.stderr, flush=True)
            return False
        self._begin(rung, verdict, ranks, link)
        return True

    def _begin(self, rung: Rung, verdict: Verdict | None, ranks: NodeRanks, link: WatchLink | None) -> None:
        """Has all nodes make ready for the plan of a rung."""
        assert rung.plan is not None
        recovery = self._recovery
        ends: list[End] = [end for end in link.members if end.known] if link is not None else []
        self._verdict, self._waiting = verdict, {end.about.node for end in ends} - self._lost_nodes
        self._until = time.monotonic() + _ANSWER_S
        prepared = Prepared(replace(rung.plan, store=self._store), rung.standing, rung.started, self._before)
        self.lacks_store = self.lacks_store or (link is not None and recovery.store_is_gone())
        if self.lacks_store:
            recovery.make_store()
        elif link is not None:
            link.tell(prepare=prepared.dump())
        recovery.prepare(prepared, ranks)
        self.advance(ranks, link)

    def _without_blamed(self, found: Fault, link: WatchLink | None) -> Rung | None:
        """What leaves out the node of a fault, if it is not the first one there, and others have enough spares. The
        deciding node stays; what it is blamed for is mended there."""
        standing, verdict = self._recovery.standing, found.verdict
        nodes = {standing.nodes[slot] for slot in verdict.ranks}
        if link is None or verdict.kind in (LOST_NODE, LINK) or len(nodes) != 1:
            return None
        node = nodes.pop()
        self._blamed[node] = self._blamed.get(node, 0) + 1
        if self._blamed[node] < _BLAMED or node == self._recovery.node:
            return None
        slots = tuple(slot for slot, each in enumerate(standing.nodes) if each == node)
        rung = climb(standing, replace(found, verdict=replace(verdict, kind=LOST_NODE, ranks=slots)))
        if rung.plan is None or rung.plan.rung != "spare":
            return None
        self.without_node(node)
        spares = {number: where for number, where in rung.standing.spares.items() if where != node}
        return replace(rung, standing=replace(rung.standing, spares=spares))

    def is_gone(self, node: str, epoch: int) -> None:
        """A node has made ready for the plan of an epoch."""
        prepared = self._recovery.prepared
        if prepared is not None and prepared.plan.epoch == epoch:
            self._waiting.discard(node)

    def advance(self, ranks: NodeRanks, link: WatchLink | None) -> None:
        """Goes on to the next mesh, as soon as all nodes are ready for it."""
        recovery = self._recovery
        prepared, late = recovery.prepared, time.monotonic() > self._until
        if prepared is None or self.cut_off:
            return
        if self.lacks_store:
            port = recovery.store_port()
            if not port and not late:
                return
            self._store, self.lacks_store = f"{self._host}:{port}" if port else self._store, False
            recovery.prepared = prepared = replace(prepared, plan=replace(prepared.plan, store=self._store))
            if link is not None:
                link.tell(prepare=prepared.dump())
        if not recovery.ready or (self._waiting and not late):
            return
        if not self._claim(prepared.plan.epoch):
            self.cut_off = "this node is cut off from the others, which go on without it"
            return
        if link is not None:
            link.tell(publish=prepared.plan.epoch)
        recovery.publish(ranks)
        self._before = prepared.plan
        self._tell(prepared.plan)

    def _claim(self, epoch: int) -> bool:
        """Whether nobody else has shown a plan of this epoch to anybody."""
        if not self._claims:
            return True
        with contextlib.suppress(OSError):
            folder = record_folder(self._recovery.run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"mesh.{self._claims}.{epoch}"
            try:
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                return False
            return True
        return False  # without the run's folder nothing could be written anyway

    def _tell(self, plan: EpochPlan) -> None:
        """Says what happened, and what is done about it."""
        verdict, self._verdict = self._verdict, None
        layout = f" of {plan.layout}" if plan.layout else ""
        done = f"{plan.rung}: the job goes on in mesh {plan.epoch}{layout}"
        print(f"{'fault: ' if verdict is not None else ''}{plan.line}; {done}", file=sys.stderr, flush=True)
        if verdict is None:
            return
        about = {"kind": verdict.kind, "ranks": list(verdict.ranks), "lost": list(plan.lost), "line": verdict.line}
        event = {"time": verdict.at, "event": "fault", **about, "epoch": plan.epoch, "rung": plan.rung}
        event |= {"layout": plan.layout} if plan.layout else {}
        file = Path(self._recovery.run_dir) / RunFile.EVENTS
        with contextlib.suppress(OSError), open(file, "ab", buffering=0) as events:
            events.write(json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        """At the job's end: nobody else is left who could claim an epoch."""
        if self._claims and not self._lost_nodes:
            with contextlib.suppress(OSError):
                for file in record_folder(self._recovery.run_dir).glob(f"mesh.{self._claims}.*"):
                    file.unlink(missing_ok=True)
