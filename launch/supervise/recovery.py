"""What the watcher of a node does there when a fault is mended: the lost are ended, others are put in their places, and
the ranks are told who.

It is the watcher's side of `trainer.recovery`: it knows processes, slots and plans, nothing of what is computed. Who
goes on in which slot is decided by one watcher for all nodes (`decider.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Collection
from pathlib import Path

from ...configs.strict_json import JsonError, expect_int, expect_object, parse_json
from ...parallel.record.stand import Condition
from ...trainer.processes.watch import WatchRequest
from ...trainer.recovery.plan import end_plans, publish_plan
from ...trainer.recovery.ways import Way
from .fork_protocol import Wire, open_wire
from .ladder import Standing
from .node_ranks import NodeRanks
from .nodes.standing_text import Prepared
from .watched import WatchedRank
from .worker_files import STORE, store_port

_DYING_S = 2.0
"""For the kernel to end a killed process; one that hangs in a device is fenced by the plan all the same."""
_LEAVE_S = 2.0
"""For spares to leave at the job's end."""
GONE = (Condition.DEAD, Condition.FAILED, Condition.LOST)
"""Of slots whose processes are not there any more, or end by themselves."""


class Recovery:
    """What mends faults on one node.

    Args:
        folder: of the job on this node.
        wire: to its fork server.
        request: what is watched.
        spares: processes that are to be ready on each node.
    """

    def __init__(self, folder: Path, wire: Wire, request: WatchRequest, spares: int) -> None:
        self.folder, self._wire, self.spares = folder, wire, spares
        self.node = node = f"{socket.gethostname()} {folder}"
        """Its name among the job's, also where several pretend to be on one host."""
        self.run_dir = Path(request.run_dir)
        members = tuple(range(request.world))
        nodes, ladder = (node if request.local >= request.world else "",) * len(members), request.ladder
        self.standing = Standing(
            0,
            members,
            nodes,
            next_number=request.world,
            rungs=ladder.rungs,
            ways=ladder.ways or (Way("", "", len(members)),),
        )
        """Who is there, as the deciding watcher has told it last; its nodes are known when their watchers have met."""
        self.grows, self.began = ladder.grow, request.local
        """Whether new processes are started to come back to a better layout; how many slots this node began with."""
        self.prepared: Prepared | None = None
        """What all nodes make ready for."""
        self.starts = True
        """Whether new processes come up."""
        self.reachable = True
        """Whether the fork server is there."""
        self.ended_spares: list[int] = []
        """Those of which the deciding watcher does not know yet."""
        self.last_store = ""
        """Where the ranks of the newest plan meet."""
        self._lost: list[WatchedRank] = []
        self._until = 0.0
        wire.send(watch=True)

    @staticmethod
    def of(folder: Path, request: WatchRequest, spares: int) -> Recovery | None:
        """None: there is nobody who could fork; then a fault ends the job."""
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
        return self.standing.epoch

    def look(self, ranks: NodeRanks, ready: set[int]) -> None:
        """Hears who has ended."""
        if self._wire.fileno() in ready and self.reachable:
            try:
                for line in self._wire.read():
                    known = expect_object(parse_json(line), "an end", ("ended", "code"))
                    ranks.codes[expect_int(known["ended"], "ended")] = expect_int(known["code"], "code", -64)
            except (ConnectionError, JsonError):
                self.reachable = self.starts = False
        ended = [number for number in (*ranks.spares, *ranks.spares_coming) if number in ranks.codes]
        if ended:  # before they had begun: others would not begin either
            self.starts = self.starts and all(number in ranks.spares for number in ended)
            ranks.spares_coming -= set(ended)
            ranks.tidy([ranks.spares.pop(number) for number in ended if number in ranks.spares])
            self.ended_spares += ended

    @property
    def slots(self) -> int:
        """Of that mesh, on all nodes."""
        return len(self.standing.members)

    def fork_spare(self, number: int, ranks: NodeRanks) -> None:
        """Has another process made ready."""
        self._wire.send(fork=number)
        ranks.spares_coming.add(number)

    def miss(self, slots: Collection[int], ranks: NodeRanks) -> None:
        """Nobody misses these any more, for all that the job was for is done: they end in good order."""
        for slot in slots:
            if slot in ranks.slots:
                ranks.slots[slot].missed_by_nobody = True
            self._wire.send(missed=self.standing.members[slot])

    # From a decision to the next mesh ---------------------------------------------------------------------------

    def prepare(self, prepared: Prepared, ranks: NodeRanks) -> None:
        """Makes ready for a plan: all leave their mesh, the lost are killed, those who are missing are started."""
        self.prepared = prepared
        ranks.abort(self.epoch)
        self._lost = [rank for rank in ranks.slots.values() if rank.number in prepared.plan.lost]
        _kill(self._lost)
        for number, node in prepared.started.items():
            if node == self.node:
                self._wire.send(fork=number)
        self._until = time.monotonic() + _DYING_S

    @property
    def ready(self) -> bool:
        """Whether the lost ones of this node are gone, as the kernel says."""
        return all(rank.has_ended() for rank in self._lost) or time.monotonic() > self._until

    def publish(self, ranks: NodeRanks) -> None:
        """Shows the plan to the ranks of this node."""
        prepared, self.prepared = self.prepared, None
        if prepared is None:
            return
        plan, before = prepared.plan, prepared.before
        if before is not None and not (self.folder / f"plan.{before.epoch}").exists():
            publish_plan(self.folder, before)
        self._wire.send(plan=list(plan.members))
        publish_plan(self.folder, plan)
        self.standing, self.last_store = prepared.standing, plan.store
        here = {slot: plan.members[slot] for slot, node in enumerate(self.standing.nodes) if node == self.node}
        ranks.follow(plan.epoch, here, plan.spares, time.monotonic())
        ranks.tidy(self._lost)
        for rank in self._lost:
            rank.close()
            (self.folder / f"failure.{rank.number}").unlink(missing_ok=True)
        self._lost = []

    # Where the ranks meet ---------------------------------------------------------------------------------------

    def make_store(self) -> None:
        """Has a store started on this node."""
        (self.folder / STORE).unlink(missing_ok=True)
        self._wire.send(store=True)

    def store_port(self) -> int:
        """Where that one listens; 0: it does not yet."""
        return store_port(self.folder)

    def store_is_gone(self) -> bool:
        """Whether there was a store of this node's, and nobody listens there any more."""
        port = store_port(self.folder)
        try:
            if port:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return True
        return False

    def close(self, ranks: NodeRanks) -> None:
        """At the job's end, good or bad: whoever waits for a plan leaves, and a slot ends as its process does."""
        with contextlib.suppress(OSError):
            end_plans(self.folder)
        self._wire.send(end=True)
        self._wire.close()
        spares = list(ranks.spares.values())
        _wait_for_ends(spares, _LEAVE_S)
        # Whoever was first on the node, and would have kept the records of all, may be among the lost.
        ranks.tidy([*spares, *(rank for rank in ranks.slots.values() if rank.has_ended())])


def _kill(lost: list[WatchedRank]) -> None:
    for rank in lost:
        if not rank.has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.header.pid, signal.SIGKILL)  # of a stopped process too


def _wait_for_ends(ranks: list[WatchedRank], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(rank.has_ended() for rank in ranks):
        time.sleep(0.001)
