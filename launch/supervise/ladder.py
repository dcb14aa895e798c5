"""The recovery ladder: after a verdict, who goes on in which slot, or why the job ends. A pure function, no torch.

    rejoin    all processes live, a connection does not: the same members meet anew
    spare     a process of the node that is ready takes the slot; of another node where the whole node is lost
    respawn   a new process takes it, forked on the node
    shrink, resplit, layouts
              those that are left go on in a layout that needs no more of them (`trainer.recovery.ways`)
    end       what a new process would only meet again
    grow      without a fault: enough processes are ready for a better layout

The state that a newcomer needs is not decided here (`trainer.recovery`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...parallel.record.diagnosis import (
    DATA_LIVELOCK,
    DATA_STALL,
    ENDED,
    FAILED,
    FROZEN,
    HANG,
    KILLED,
    LINK,
    LIVELOCK,
    LOST_NODE,
    OUT_OF_MEMORY,
    STOPPED,
    Verdict,
)
from ...trainer.recovery.plan import EpochPlan
from ...trainer.recovery.ways import Way
from .seats import resplit_seating, seated

_REPLACED = (
    KILLED,
    ENDED,
    OUT_OF_MEMORY,
    LOST_NODE,
    STOPPED,
    FROZEN,
    FAILED,
    HANG,
    LIVELOCK,
    DATA_STALL,
    DATA_LIVELOCK,
)
"""Kinds of fault that another process need not meet again."""
_TRIES = 3
"""Faults in one step after which another try is not worth it."""


@dataclass(frozen=True)
class Standing:
    """Who is there.

    Args:
        epoch: of the mesh.
        members: the number of the process in each slot.
        nodes: the node of each slot, by any name.
        spares: the number of each process that is in no slot, and its node.
        next_number: of the process that is started next.
        step: the largest step that any process had under way when the last fault came; -1: there was none.
        tries: how many faults came in that step.
        lines: what the last faults in that step said.
        rungs: what is tried, in this order.
        ways: layouts that the job can have, the best one first, which is its own.
        way, split: the one that it has, and which of its splits.
        coming: numbers of spares that are not ready yet.
        starts: whether new processes come up.
    """

    epoch: int
    members: tuple[int, ...]
    nodes: tuple[str, ...]
    spares: Mapping[int, str] = field(default_factory=dict)
    next_number: int = 0
    step: int = -1
    tries: int = 0
    lines: tuple[str, ...] = ()
    rungs: tuple[str, ...] = ("spare", "respawn")
    ways: tuple[Way, ...] = ()
    way: int = 0
    split: int = 0
    coming: frozenset[int] = frozenset()
    starts: bool = True

    @property
    def layout(self) -> str:
        """Of the mesh, as a plan names it."""
        return self.now.layout if self.ways else ""

    @property
    def now(self) -> Way:
        """Its layout."""
        return self.ways[self.way].settled()[self.split]

    @property
    def where(self) -> dict[int, str]:
        """The node of each process."""
        return {**dict(zip(self.members, self.nodes, strict=True)), **self.spares}

    def ready(self, without: Collection[str] = ()) -> list[int]:
        """Spares that are ready, on nodes that are there."""
        return sorted(n for n, node in self.spares.items() if n not in self.coming and node not in without)


@dataclass(frozen=True)
class Fault:
    """What is known of a fault.

    Args:
        verdict: whom the watcher blames; its ranks are slots.
        gone: slots whose processes have ended, or fail by themselves.
        lines: the own errors of those that fail, by slot.
        step: the largest step that any process has under way; 0: none has begun one.
        user: whether an error is a mistake of the user's.
    """

    verdict: Verdict
    gone: Collection[int] = ()
    lines: Mapping[int, str] = field(default_factory=dict)
    step: int = 0
    user: bool = False


@dataclass(frozen=True)
class Rung:
    """What is done.

    Args:
        plan: of the next mesh; None: the job ends.
        started: numbers of processes to start, and the node of each.
        why: the job ends.
        standing: after it.
    """

    plan: EpochPlan | None
    standing: Standing
    started: Mapping[int, str] = field(default_factory=dict)
    why: str = ""


def climb(standing: Standing, found: Fault) -> Rung:
    """The next rung after a fault."""
    verdict = found.verdict
    again = found.step <= standing.step
    tries, lines = (standing.tries, standing.lines) if again else (0, ())
    why = _hopeless(found, len(standing.members), tries, lines)
    if why:
        return Rung(None, standing, why=why)
    slots = sorted({*found.gone, *(verdict.ranks if verdict.kind in _REPLACED else ())})
    lost_nodes = {standing.nodes[slot] for slot in verdict.ranks} if verdict.kind == LOST_NODE else set[str]()
    step, own = max(found.step, standing.step), sorted(set(found.lines.values()))
    after = replace(standing, step=step, tries=tries + 1, lines=(*lines, *own))
    if not slots:
        return _planned(after, "rejoin", standing.members, standing.nodes, verdict)
    for name in standing.rungs:
        if name in ("spare", "respawn"):
            rung = _replaced(after, name, slots, lost_nodes, verdict)
        else:
            rung = _laid_out(after, name, slots, lost_nodes, verdict)
        if rung is not None:
            return rung
    whole = "a whole node is lost, and " if lost_nodes else ""
    return Rung(None, standing, why=f"{whole}nothing on the ladder ({', '.join(standing.rungs)}) has enough processes")


def grown(standing: Standing) -> Rung | None:
    """What the job can grow to without a fault, with the spares that are ready; None: nothing better."""
    ready = standing.ready()
    for at, way in enumerate(standing.ways[: standing.way]):
        if way.members <= len(standing.members) + len(ready):
            line = f"{len(ready)} more processes are ready"
            return _in_way(standing, at, "grow", (), set(), Verdict(LINK, (), line, at=time.time()))
    return None


def met_anew(standing: Standing) -> Rung:
    """The same members in a new mesh: they have left theirs for spares that are gone."""
    verdict = Verdict(LINK, (), "the processes that were to join are gone", at=time.time())
    return _planned(standing, "rejoin", standing.members, standing.nodes, verdict)


def _replaced(
    standing: Standing, name: str, slots: Collection[int], lost_nodes: Collection[str], verdict: Verdict
) -> Rung | None:
    """Others in the places of the lost, ready ones first; None: there are too few."""
    members, nodes = list(standing.members), list(standing.nodes)
    spares, started, number = dict(standing.spares), dict[int, str](), standing.next_number
    if name == "spare":
        spares = {n: spares[n] for n in standing.ready()}
    for slot in slots:
        # Of another node only where the slot's own is gone: its launcher waits for an exit code of the slot.
        away = nodes[slot] in lost_nodes
        there = (n for n, node in spares.items() if (node not in lost_nodes if away else node == nodes[slot]))
        found = min(there, key=lambda n: (n in standing.coming, n), default=None)
        if found is not None:
            members[slot], nodes[slot] = found, spares.pop(found)
        elif away or name == "spare" or not standing.starts:
            return None
        else:
            members[slot], started[number], number = number, nodes[slot], number + 1
    return _planned(replace(standing, next_number=number), name, members, nodes, verdict, slots, started)


def _laid_out(
    standing: Standing, name: str, slots: Collection[int], lost_nodes: Collection[str], verdict: Verdict
) -> Rung | None:
    """Those that are left in the best layout of a rung that they are enough for; None: there is none."""
    left = len(standing.members) - len(slots) + len(standing.ready(lost_nodes))
    for at, way in enumerate(standing.ways):
        if way.rung == name and way.members <= left:
            return _in_way(standing, at, name, slots, lost_nodes, verdict)
    return None


def _in_way(
    standing: Standing, at: int, name: str, slots: Collection[int], lost_nodes: Collection[str], verdict: Verdict
) -> Rung:
    """A mesh of another layout."""
    where, ready = standing.where, standing.ready(lost_nodes)
    before, splits = standing.now, standing.ways[at].settled()

    def moved(split: int) -> int:
        seating = resplit_seating(before, splits[split], standing.members, slots, ready)
        return 0 if seating is None else seating.moved

    split = min(range(len(splits)), key=moved)
    members = seated(before, splits[split], standing.members, slots, ready)
    nodes = tuple(where[number] for number in members)
    return _planned(replace(standing, way=at, split=split), name, members, nodes, verdict, slots)


def _planned(
    standing: Standing,
    name: str,
    members: Iterable[int],
    nodes: Iterable[str],
    verdict: Verdict,
    slots: Collection[int] = (),
    started: Mapping[int, str] | None = None,
) -> Rung:
    """The rung that puts `members` into the slots; whoever else is there waits."""
    members, lost = tuple(members), tuple(standing.members[slot] for slot in slots)
    spares = {number: node for number, node in standing.where.items() if number not in (*members, *lost)}
    epoch, waiting = standing.epoch + 1, tuple(spares)
    plan = EpochPlan(epoch, members, lost, verdict.line, verdict.at, name, layout=standing.layout, spares=waiting)
    after = replace(standing, epoch=epoch, members=members, nodes=tuple(nodes), spares=spares)
    return Rung(plan, after, started or {})


def _hopeless(found: Fault, world: int, tries: int, lines: tuple[str, ...]) -> str:
    """Why a new process would not help; empty: it may."""
    verdict, own = found.verdict, list(found.lines.values())
    if found.user:
        return "it is a mistake of the configuration"
    if verdict.kind not in (*_REPLACED, LINK):
        return f"{verdict.kind} is in the program or outside of the processes"
    if verdict.kind == FAILED and not found.step:
        return "it failed before its first step"
    if len(own) > 1 and 2 * len(own) >= world and len(set(own)) == 1:
        return "the ranks fail alike"
    if set(own) & set(lines):
        return "the same error came again in the same step"
    if tries >= _TRIES:
        return f"{tries} faults in one step were mended and it was not done"
    return ""
