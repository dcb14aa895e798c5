"""The watchers of several nodes decide together: over real sockets, with stand-ins for ranks and fork servers."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pentad.launch.supervise import recovery as recoveries
from pentad.launch.supervise.ladder import Standing
from pentad.launch.supervise.nodes.conversation import Conversation
from pentad.launch.supervise.recovery import Recovery
from pentad.launch.supervise.worker_files import STORE
from pentad.parallel.record.diagnosis import KILLED, LOST_NODE, Verdict
from pentad.parallel.record.stand import Condition, Stand
from pentad.trainer.processes.watch import WatchRequest
from pentad.trainer.recovery.plan import EpochPlan, Membership

TOKEN = "token"


@dataclass
class FakeRank:
    """A rank; it may take a while to die."""

    number: int
    dead: bool = False
    killed: bool = False
    lingers: bool = False
    ready: bool = False
    left = failed = by_user = on_its_way = missed_by_nobody = False

    def has_ended(self) -> bool:
        return self.dead or (self.killed and not self.lingers)

    def close(self) -> None:
        pass


@dataclass
class FakeRanks:
    """Those of a node."""

    host: str
    slots: dict[int, FakeRank]
    spares: dict[int, FakeRank] = field(default_factory=dict)
    spares_coming: set[int] = field(default_factory=set)
    codes: dict[int, int] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    complete = True

    def live(self) -> list[FakeRank]:
        return [rank for rank in self.slots.values() if not rank.has_ended()]

    def abort(self, epoch: int) -> None:
        self.aborted.add(epoch)

    def conditions(self) -> dict[int, Condition]:
        return {slot: Condition.DEAD for slot, rank in self.slots.items() if rank.dead}

    def stands(self, now: float) -> dict[int, Stand]:
        found = self.conditions()
        return {s: Stand(s, self.host, condition=found.get(s, Condition.RUNS), at=(7, 0, 0)) for s in self.slots}

    def with_stacks(self, stands: dict[int, Stand]) -> dict[int, Stand]:
        return stands

    def follow(self, epoch: int, members: dict[int, int], spares: tuple[int, ...], now: float) -> None:
        known = {rank.number: rank for rank in (*self.slots.values(), *self.spares.values())}
        self.slots = {slot: known.get(number) or FakeRank(number) for slot, number in members.items()}
        self.spares = {n: rank for n, rank in self.spares.items() if n not in members.values()}

    def tidy(self, ranks: list[FakeRank]) -> None:
        pass


class FakeWire:
    """To a fork server, whose store listens at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[dict[str, Any]] = []

    def fileno(self) -> int:
        return -1

    def send(self, **message: Any) -> None:
        self.told.append(message)
        if "store" in message:
            (self.folder / STORE).write_text("4711")


class Node:
    """A node's watcher, but for what it sees of real processes."""

    def __init__(self, folder: Path, slots: list[int], world: int, home: str, spares: int) -> None:
        folder.mkdir()
        self.folder, self.world = folder, world
        self.ranks: Any = FakeRanks(f"host-{folder.name}", {slot: FakeRank(slot) for slot in slots})
        run_dir = str(folder.parent / "run")
        request = WatchRequest("x", run_dir, world, len(slots), 1.5, 4.0, 9.0, slots[0], TOKEN, home, host="node-1")
        self.wire: Any = FakeWire(folder)
        self.recovery = Recovery(folder, self.wire, request, spares)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.verdicts: list[Verdict] = []
        self.gone = self.mute = False
        self.talk = Conversation(
            request,
            self.ranks,
            self.recovery,
            self.listener,
            decide=self._decide,
            judged=lambda verdict, mend: self._judged(verdict, {}, mend),
            mended=lambda: None,
            hurried=lambda: True,
        )

    @property
    def home(self) -> str:
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def _decide(self, stands: dict[int, Stand], impatient: bool, user: bool) -> None:
        for kind, condition in ((KILLED, Condition.DEAD), (LOST_NODE, Condition.GONE)):
            slots = tuple(slot for slot, stand in sorted(stands.items()) if stand.condition is condition)
            if slots:
                self._judged(Verdict(kind, slots, f"{kind} {slots}", at=time.time()), stands, True)
                return

    def _judged(self, verdict: Verdict, stands: dict[int, Stand], mend: bool) -> None:
        decider = self.talk.decider if mend and self.talk.is_home else None
        if decider is None or not decider.mends(verdict, stands, self.ranks, self.talk.link, user=False):
            self.verdicts.append(verdict)

    def look(self) -> None:
        if self.gone or self.mute:
            return
        ready, _, _ = select.select(self.talk.sockets(), [], [], 0)
        now = time.monotonic()
        for number in self.ranks.spares_coming.copy():
            self.ranks.spares_coming.discard(number)
            self.ranks.spares[number] = FakeRank(number, ready=True)
        if not self.talk.waits and self.ranks.conditions():
            self.talk.suspect(now, impatient=False)
        self.talk.converse({each.fileno() for each in ready}, now)
        self.talk.look()

    def die(self) -> None:
        """What a power cut does."""
        self.gone = True
        for connection in self.talk.sockets():
            connection.close()

    def plan(self) -> EpochPlan | None:
        return Membership(self.folder, 0, self.world).wait(0, 0)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Node]]:
    def kill(lost: list[FakeRank]) -> None:
        for rank in lost:
            rank.killed = True

    monkeypatch.setattr(recoveries, "_kill", kill)

    def make(count: int, each: int, spares: int = 1) -> list[Node]:
        made: list[Node] = []
        for node in range(count):
            slots = list(range(node * each, (node + 1) * each))
            home = made[0].home if made else ""
            made.append(Node(tmp_path / str(node), slots, count * each, home, spares))

        def met(standing: Standing) -> bool:
            return "" not in standing.nodes and len(standing.spares) == count * spares and not standing.coming

        until(made, lambda: all(met(node.recovery.standing) for node in made))
        return made

    return make


def until(nodes: list[Node], holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Lets all watchers look until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, [node.verdicts for node in nodes]
        for node in nodes:
            node.look()
        time.sleep(0.001)


def mended(nodes: list[Node], epoch: int) -> EpochPlan:
    """The plan of an epoch, which all living nodes show."""

    def shown() -> bool:
        assert not any(node.verdicts for node in nodes), [node.verdicts for node in nodes]
        plans = [node.plan() for node in nodes if not node.gone]
        return all(plan is not None and plan.epoch == epoch for plan in plans)

    until(nodes, shown)
    plans = {node.plan() for node in nodes if not node.gone}
    assert len(plans) == 1
    plan = plans.pop()
    assert plan is not None
    return plan


def test_a_rank_lost_on_another_node_is_replaced_there_and_all_are_told(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(3, 2)
    made[1].ranks.slots[3].dead = True
    plan = mended(made, 1)
    spare = plan.members[3]
    assert plan.members == (0, 1, 2, spare, 4, 5) and plan.lost == (3,) and plan.rung == "spare" and plan.store == ""
    assert made[1].ranks.slots[3].number == spare and all(node.ranks.aborted == {0} for node in made)
    events = [json.loads(line) for line in (made[0].recovery.run_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["ranks"], event["epoch"]) for event in events] == [("fault", [3], 1)]
    until(made, lambda: len(made[2].recovery.standing.spares) == 3)


def test_no_plan_is_shown_before_the_lost_of_another_node_are_gone(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(2, 2)
    blamed = made[1].ranks.slots[2]
    blamed.lingers = True
    decider = made[0].talk.decider
    assert decider is not None
    verdict = Verdict("stopped", (2,), "rank 2 was stopped", at=time.time())
    assert decider.mends(verdict, {}, made[0].ranks, made[0].talk.link, user=False)
    until(made, lambda: blamed.killed)
    for _ in range(50):
        for node in made:
            node.look()
    assert made[0].plan() is made[1].plan() is None
    blamed.lingers = False
    assert mended(made, 1).lost == (2,)


def test_a_lost_node_is_replaced_by_spares_of_the_others(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(3, 2)
    made[2].die()
    plan = mended(made, 1)
    assert plan.lost == (4, 5) and plan.members[:4] == (0, 1, 2, 3) and plan.rung == "spare"
    where = made[0].recovery.standing.nodes
    assert {where[4], where[5]} == {made[0].recovery.node, made[1].recovery.node}
    assert set(made[0].ranks.slots) | set(made[1].ranks.slots) == set(range(6))
    made[1].ranks.slots[2].dead = True
    assert mended(made, 2).lost == (2,), "the job goes on to be mended"


def test_when_the_deciding_node_is_lost_the_next_one_decides_and_has_a_store(
    nodes: Callable[..., list[Node]],
) -> None:
    made = nodes(3, 2)
    made[0].die()
    plan = mended(made, 1)
    assert plan.lost == (0, 1) and plan.members[2:] == (2, 3, 4, 5) and plan.store == "127.0.0.1:4711"
    assert made[1].talk.is_home and not made[2].talk.is_home
    made[2].ranks.slots[4].dead = True
    plan = mended(made, 2)
    assert plan.lost == (4,) and plan.store == "127.0.0.1:4711"


def test_when_the_next_one_is_lost_with_it_the_one_after_that_decides(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(4, 1)
    made[0].die()
    made[1].die()
    plan = mended(made, 1)
    assert plan.lost == (0, 1) and made[2].talk.is_home and plan.rung == "spare"


def test_a_store_that_is_gone_is_made_anew(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(2, 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (made[0].folder / STORE).write_text(str(listener.getsockname()[1]))
        made[1].ranks.slots[1].dead = True
        assert mended(made, 1).store == ""
    link = Verdict("link", (1,), "rank 1 lost the connection", at=time.time())
    made[0]._judged(link, {}, True)
    plan = mended(made, 2)
    assert plan.store == "node-1:4711" and plan.rung == "rejoin" and plan.members == (0, 3)


def test_a_node_lost_while_the_others_make_ready_is_replaced_after_that(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(3, 1, 2)
    made[1].ranks.slots[1].dead = True
    made[2].mute = True
    until(made, lambda: made[0].recovery.prepared is not None)
    made[2].die()
    plan = mended(made, 2)
    assert plan.lost == (2,) and 1 not in plan.members


def test_a_silent_node_is_a_lost_one(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(2, 1)
    made[1].mute = True
    until(made, lambda: made[0].plan() is not None)
    plan = made[0].plan()
    assert plan is not None and plan.lost == (1,)
    made[1].mute = False  # it wakes up, and takes the others for lost
    until(made, lambda: bool(made[1].verdicts))
    assert "cut off" in made[1].verdicts[0].line and made[1].plan() is None and not made[0].verdicts


def test_a_node_blamed_twice_is_left_out_where_the_others_have_enough_spares(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(3, 1)
    made[2].ranks.slots[2].dead = True
    where = made[2].recovery.node
    assert mended(made, 1).lost == (2,) and made[0].recovery.standing.nodes[2] == where
    until(made, lambda: len(made[0].recovery.standing.ready()) == 3)
    made[2].ranks.slots[2].dead = True
    plan = mended(made, 2)
    assert made[0].recovery.standing.nodes[2] != where and not made[2].ranks.slots
    assert {"plan": list(plan.members)} in made[2].wire.told
    assert where not in made[0].recovery.standing.spares.values()


def test_where_a_link_breaks_only_one_side_goes_on(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(2, 1)
    link = made[1].talk.link
    assert link is not None and link.home is not None
    link.home.connection.shutdown(socket.SHUT_RDWR)
    until(made, lambda: any(node.plan() for node in made) and any(node.verdicts for node in made))
    (on,) = [node for node in made if node.plan()]
    (off,) = [node for node in made if node.verdicts]
    plan = on.plan()
    assert on is not off and plan is not None and plan.lost == tuple(off.ranks.slots)
    assert "cut off" in off.verdicts[0].line


def test_without_spares_elsewhere_a_lost_node_ends_the_job(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(3, 2, 0)
    made[1].die()
    until(made, lambda: bool(made[0].verdicts))
    assert made[0].verdicts[0].kind == LOST_NODE and made[0].plan() is None


def test_who_is_lost_when_all_is_done_is_missed_by_nobody(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(2, 1)
    for node in made:
        for rank in node.ranks.slots.values():
            rank.left = True
    made[1].ranks.slots[1].dead = True
    until(made, lambda: made[1].ranks.slots[1].missed_by_nobody)
    assert {"missed": 1} in made[1].wire.told and made[0].plan() is None


def test_a_stranger_is_not_heard(nodes: Callable[..., list[Node]]) -> None:
    made = nodes(2, 1)
    host, _, port = made[0].home.partition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b'{"hello": "guess", "host": "x", "node": "y", "port": 1, "ranks": [0]}\n{"blame": {}}\n')
        for _ in range(20):
            for node in made:
                node.look()
        stranger.settimeout(5)
        assert stranger.recv(100) == b""
    assert not made[0].verdicts
