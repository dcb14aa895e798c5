"""What the watcher of one node says to those of the others, and hears from them.

One of them is home: it asks where all ranks stand, judges, and decides how the job goes on. The first is that of rank
0; when its node is lost the next one on a list that all know takes over, with what it was told of the state of things.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ....configs.strict_json import JsonError, expect_int, expect_list
from ....parallel.record.diagnosis import LOST_NODE, Verdict
from ....parallel.record.stand import Condition, Stand
from ....parallel.record.stand_text import dump_stand
from ....trainer.processes.watch import WatchRequest
from ..node_ranks import NodeRanks
from ..recovery import Recovery
from .decider import Decider, NodeReport, report_of
from .inquiry import Inquiry
from .standing_text import Address, Prepared, dump_state, load_state
from .watch_link import End, Introduction, WatchLink

_AGAIN_S = 0.5
"""After a suspicion that was none."""
_BEAT_S = 0.5
"""Between two signs of life of a watcher."""
_TAKE_OVER_S = 5.0
"""For the watchers that are left to find each other."""


class Conversation:
    """A watcher's part in it.

    Args:
        request: what it watches.
        ranks: of its node.
        recovery: of its node; none: a fault ends the job.
        listener: where others call; none: nobody does.
        decide: given where all ranks stand, whether to be impatient, and whether a mistake of the user's was told.
        judged: given a verdict, and whether it is to be mended if it can be.
        mended: told that the job goes on.
        hurried: whether a rank is known to be dead, so that nothing but words can be found out.
    """

    def __init__(
        self,
        request: WatchRequest,
        ranks: NodeRanks,
        recovery: Recovery | None,
        listener: socket.socket | None,
        *,
        decide: Callable[[dict[int, Stand], bool, bool], object],
        judged: Callable[[Verdict, bool], object],
        mended: Callable[[], object],
        hurried: Callable[[], bool],
    ) -> None:
        self._request, self._ranks, self._recovery, self._listener = request, ranks, recovery, listener
        self._decide, self._judged, self._mended, self._hurried = decide, judged, mended, hurried
        self.link: WatchLink | None = None
        alone = recovery is not None and request.local >= request.world
        self.decider = Decider(recovery) if alone and recovery is not None else None
        """What decides, if it is here."""
        self._inquiry = Inquiry()
        self._gone: list[Introduction] = []
        """Nodes that are lost."""
        self._told_until = self._beaten = 0.0
        self._roster: list[Address] = []
        self._absent: set[str] = set()
        """Nodes that have not called since this one became home."""
        self._until = 0.0
        """Until when the watchers that are left look for each other."""
        self._stated: object = None
        """What was told last of the state of things."""
        self._epoch = 0
        self._early: list[tuple[End, dict[str, Any]]] = []
        """What others say to this watcher before it knows that it is home."""

    @property
    def several(self) -> bool:
        """Whether there are other nodes to talk to."""
        return self.link is not None

    @property
    def is_home(self) -> bool:
        """Whether this watcher judges."""
        return self.link is None or self.link.is_home

    @property
    def waits(self) -> bool:
        """Whether a plan is on its way, before which nothing is judged."""
        return (self._recovery is not None and self._recovery.prepared is not None) or self._until > 0

    def sockets(self) -> list[socket.socket]:
        """What to wait for."""
        return self.link.sockets() if self.link is not None else []

    def excuse(self, seconds: float) -> None:
        """Does not count a time in which this process was kept from hearing anybody."""
        if self.link is not None:
            self.link.excuse(seconds)

    # What is wrong ----------------------------------------------------------------------------------------------

    def suspect(self, now: float, *, impatient: bool) -> None:
        """Something is wrong on this node."""
        if self.is_home:
            self._ask(now, impatient=impatient)
        elif now > self._told_until and self.link is not None:
            self._told_until = now + _AGAIN_S
            self.link.tell(trouble=impatient)

    def blame(self, verdict: Verdict) -> None:
        """Has the one that decides judge by a verdict that was found here."""
        if self.link is not None and self._recovery is not None and time.monotonic() > self._told_until:
            self._told_until = time.monotonic() + _AGAIN_S
            self.link.tell(blame=verdict.as_dict(), epoch=self._recovery.epoch)

    def tell_verdict(self, verdict: Verdict) -> None:
        """Ends the job on all nodes."""
        if self.link is not None and self.is_home:
            self.link.tell(verdict=verdict.as_dict())

    def _ask(self, now: float, *, impatient: bool = False) -> None:
        """Asks the other nodes where their ranks stand; what they say is judged in `converse`."""
        if self.link is not None:
            self._inquiry.ask(self.link, now, impatient=impatient, stacks=not self._hurried())

    # Every look -------------------------------------------------------------------------------------------------

    def converse(self, ready: set[int], now: float) -> None:
        """Hears the other nodes, and answers."""
        if self.link is None:
            self._meet()
            return
        for end, message in self.link.read(ready):
            with contextlib.suppress(JsonError):
                self._hear(end, message, now)
        if self._recovery is not None:
            self._live(self.link, self._recovery, now)
        lost, self.link.lost = self.link.lost, []
        for end in lost:
            self._lose(end, now)
        if self._until:
            self._take_over(now)
        elif not self.waits:
            self._conclude(now)

    def _conclude(self, now: float) -> None:
        """Judges, when all have said where they stand."""
        answers = self._inquiry.answers | {
            slot: Stand(slot, about.host, condition=Condition.GONE)
            for about in self._gone
            for slot in self._slots_of(about)
        }
        world = self._request.world if self._recovery is None else self._recovery.slots
        if self._inquiry.over(now, world - len(answers) - len(self._ranks.slots)):
            own = self._ranks.stands(now)
            own = own if self._hurried() else self._ranks.with_stacks(own)
            impatient, self._inquiry.impatient = self._inquiry.impatient, False
            self._decide({**own, **answers}, impatient, self._inquiry.user)

    def _live(self, link: WatchLink, recovery: Recovery, now: float) -> None:
        """Shows that this watcher lives, and drops those that do not."""
        if now - self._beaten > _BEAT_S:
            self._beaten = now
            link.tell(beat=True)
        for end in link.silent(self._request.alive_s):
            link.drop(end)
        if self.decider is not None and link.is_home:
            self._state(link, recovery)
            self.decider.keep(self._ranks, link)
        elif not link.is_home:
            self._report(link, recovery)
        if recovery.prepared is not None and not link.is_home and recovery.ready:
            link.tell(gone=recovery.prepared.plan.epoch)

    def _report(self, link: WatchLink, recovery: Recovery) -> None:
        """Says which processes of this node are ready to join a mesh, if that has changed."""
        now = (report_of(self._ranks, recovery), recovery.epoch)
        if now != self._stated or recovery.ended_spares:
            self._stated = now
            link.tell(spares=recovery.ended_spares, report=now[0].dump())
            recovery.ended_spares = []

    def look(self) -> None:
        """Brings on what was decided."""
        if self.decider is not None and self.is_home:
            if self.link is None:
                self.decider.keep(self._ranks, None)
            self.decider.advance(self._ranks, self.link)
            if self.decider.cut_off:
                self._judged(Verdict(LOST_NODE, (), self.decider.cut_off, at=time.time()), False)
        if self._recovery is not None and self._recovery.epoch != self._epoch:
            self._epoch = self._recovery.epoch
            self._mended()
            self._forget()

    def _forget(self) -> None:
        """What was asked is of a mesh that is left."""
        self._told_until = 0.0
        self._inquiry.forget()
        if self.is_home and any(self._slots_of(about) for about in self._gone):
            self._ask(time.monotonic())

    # Who says what ----------------------------------------------------------------------------------------------

    def _hear(self, end: End, message: dict[str, Any], now: float) -> None:
        link = self.link
        if link is None:
            return
        if end is link.home:
            self._obey(end, message, now)
        elif "hello" in message:
            self._welcome(end)
        elif "bye" in message:
            self._roster = [each for each in self._roster if each.node != end.about.node]
        elif not link.is_home:
            self._early += [(end, message)] if "spares" in message else []  # anything else is said again
        elif "trouble" in message:
            self._ask(now, impatient=message["trouble"] is True)
        elif "stands" in message:
            self._inquiry.hear(message, self._slots_of(end.about))
        elif "blame" in message:
            if not self.waits and self._recovery is not None and message.get("epoch") == self._recovery.epoch:
                self._judged(Verdict.load(message["blame"]), True)
        elif self.decider is not None and "gone" in message:
            self.decider.is_gone(end.about.node, expect_int(message["gone"], "gone"))
        elif self.decider is not None and "spares" in message:
            ended = [expect_int(each, "a spare", 0) for each in expect_list(message["spares"], "spares")]
            self.decider.hear(end.about.node, NodeReport.load(message.get("report")), ended)

    def _obey(self, end: End, message: dict[str, Any], now: float) -> None:
        """What the one that decides wants."""
        recovery = self._recovery
        if "ask" in message:
            stands = self._ranks.stands(now)
            stands = self._ranks.with_stacks(stands) if message["ask"] is True else stands
            user = any(rank.by_user for rank in self._ranks.slots.values())
            end.send(stands=[dump_stand(stand) for stand in stands.values()], user=user)
        elif "verdict" in message:
            self._judged(Verdict.load(message["verdict"]), False)
        elif recovery is None:
            return
        elif "state" in message:
            recovery.standing, self._roster = load_state(message["state"], recovery.standing)
            self._until = 0.0
        elif "leave" in message:
            for rank in self._ranks.live():
                rank.ask_to_leave(expect_int(message["leave"], "leave", 1))
        elif "fork" in message:
            recovery.fork_spare(expect_int(message["fork"], "fork", 0), self._ranks)
        elif "prepare" in message:
            recovery.prepare(Prepared.load(message["prepare"], recovery.standing), self._ranks)
        elif "publish" in message:
            if recovery.prepared is not None and recovery.prepared.plan.epoch == message["publish"]:
                recovery.publish(self._ranks)
        elif "missed" in message:
            slots = [expect_int(each, "a slot", 0) for each in expect_list(message["missed"], "missed")]
            recovery.miss(slots, self._ranks)

    def _slots_of(self, about: Introduction) -> set[int]:
        """The slots of the mesh that are on a node."""
        if self._recovery is None:
            return set(about.ranks)
        return {slot for slot, node in enumerate(self._recovery.standing.nodes) if node == about.node}

    # Who is there -----------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Comes together with the other nodes' watchers, once all ranks of this node are there."""
        request = self._request
        if not request.token or len(self._ranks.slots) < request.local:
            return
        host, _, port = request.home.rpartition(":")
        home = (host, int(port)) if request.home else None
        node = self._recovery.node if self._recovery is not None else ""
        listens = self._listener.getsockname()[1] if self._listener is not None else 0
        about = Introduction(self._ranks.host, node, listens, tuple(sorted(self._ranks.slots)))
        with contextlib.suppress(OSError):
            self.link = WatchLink(request.token, listener=self._listener, home=home, about=about)
            if self.link.is_home and self._recovery is not None:
                self.decider = Decider(self._recovery, request.token, request.host)
                self._settle(about)

    def _settle(self, about: Introduction) -> None:
        """Takes note of where a node's slots are, at the start of a job."""
        recovery = self._recovery
        if recovery is not None and recovery.standing.epoch == 0:
            nodes = list(recovery.standing.nodes)
            for slot in about.ranks:
                if slot < len(nodes):
                    nodes[slot] = nodes[slot] or about.node
            recovery.standing = replace(recovery.standing, nodes=tuple(nodes))

    def _welcome(self, end: End) -> None:
        """Another node's watcher has come."""
        self._absent.discard(end.about.node)
        if self._recovery is not None and self.is_home:
            self._settle(end.about)
            self._roster = [each for each in self._roster if each.node != end.about.node]
            self._roster.append(Address(end.about.node, end.address, end.about.port))
            self._stated = None
            end.send(publish=self._recovery.epoch)  # where it was told of the newest plan by one that is lost

    def _state(self, link: WatchLink, recovery: Recovery) -> None:
        """Tells all what they have to know to decide in this one's place."""
        now = (recovery.standing, tuple(self._roster))
        if now != self._stated and recovery.prepared is None and "" not in recovery.standing.nodes:
            self._stated = now
            link.tell(state=dump_state(recovery.standing, self._roster))

    def _lose(self, end: End, now: float) -> None:
        """A node's connection broke without a word."""
        link, recovery = self.link, self._recovery
        if link is None:
            return
        if end is not link.home:
            self._roster = [each for each in self._roster if each.node != end.about.node]
            if link.is_home:
                self._gone.append(end.about)
                if self.decider is not None:
                    self.decider.without_node(end.about.node)
                self._ask(now)
        elif recovery is None or not self._roster:
            line = "the first node's watcher cannot be reached any more: that node is down, or the way to it"
            self._judged(Verdict(LOST_NODE, (0,), line, at=time.time()), False)
        else:
            self._until = now + _TAKE_OVER_S
            self._ranks.abort(recovery.epoch)
            self._follow_next(link, now)

    # When home is lost ------------------------------------------------------------------------------------------

    def _follow_next(self, link: WatchLink, now: float) -> None:
        """Calls the next one on the list, or is it."""
        assert self._recovery is not None
        while self._roster:
            following = self._roster[0]
            if following.node == self._recovery.node:
                self._become_home(link, self._recovery)
                return
            try:
                link.call((following.host, following.port))
                self._stated = None
                self._report(link, self._recovery)
                return
            except OSError:
                del self._roster[0]
        self._until = now

    def _become_home(self, link: WatchLink, recovery: Recovery) -> None:
        link.home = None
        own = self._roster.pop(0)
        self.decider = Decider(recovery, self._request.token, own.host)
        self.decider.lacks_store = True  # it may have been on the node that is lost
        here = {end.about.node for end in link.members if end.known}
        self._absent = {each.node for each in self._roster} - here
        if recovery.prepared is not None:  # all had been told of it: perhaps somebody was told to go on, too
            epoch = recovery.prepared.plan.epoch
            link.tell(publish=epoch)
            recovery.publish(self._ranks)
        self._stated = None
        early, self._early = self._early, []
        for end, message in early:
            self._hear(end, message, time.monotonic())

    def _take_over(self, now: float) -> None:
        """Goes on as soon as the watchers that are left have found each other."""
        link, recovery = self.link, self._recovery
        if link is None or recovery is None:
            return
        late = now > self._until
        if not link.is_home:
            if late:
                line = "neither the deciding watcher nor another one in its place can be reached: this node is cut off"
                self._judged(Verdict(LOST_NODE, (), line, at=time.time()), False)
            return
        if self._absent and not late:
            return
        self._until = 0.0
        there = {recovery.node, *(end.about.node for end in link.members if end.known)}
        standing = recovery.standing
        for node in {*standing.nodes, *standing.spares.values()} - there:
            self._gone.append(Introduction(node.partition(" ")[0], node))
            if self.decider is not None:
                self.decider.without_node(node)
        self._ask(now)

    def close(self) -> None:
        """Says goodbye."""
        if self.decider is not None:
            self.decider.close()
        if self.link is not None:
            self.link.close()
