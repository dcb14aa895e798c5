"""The recovery ladder: after a verdict, who goes on in which slot, or why the job ends. A pure function, no torch.

    rejoin    all processes live, a connection does not: the same members meet anew
    spare     a process of the node that is ready takes the slot; of another node where the whole node is lost
    respawn   a new process takes it, forked on the node
    end       what a new process would only meet again

The state that a newcomer needs is not decided here (`trainer.recovery`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

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
        spares: the number of each process that is ready, and its node.
        next_number: of the process that is started next.
        step: the largest step that any process had under way when the last fault came; -1: there was none.
        tries: how many faults came in that step.
        lines: what the last faults in that step said.
    """

    epoch: int
    members: tuple[int, ...]
    nodes: tuple[str, ...]
    spares: Mapping[int, str] = field(default_factory=dict)
    next_number: int = 0
    step: int = -1
    tries: int = 0
    lines: tuple[str, ...] = ()


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
    members, nodes = list(standing.members), list(standing.nodes)
    spares, started, number = dict(standing.spares), dict[int, str](), standing.next_number
    lost_nodes = {nodes[slot] for slot in verdict.ranks} if verdict.kind == LOST_NODE else set[str]()
    for slot in slots:
        # Of another node only where the slot's own is gone: its launcher waits for an exit code of the slot.
        away = nodes[slot] in lost_nodes
        ready = sorted(n for n, node in spares.items() if (node not in lost_nodes if away else node == nodes[slot]))
        if ready:
            members[slot], nodes[slot] = ready[0], spares.pop(ready[0])
        elif away:
            return Rung(None, standing, why="a whole node is lost, and the others have too few spares")
        else:
            members[slot], started[number], number = number, nodes[slot], number + 1
    lost = tuple(standing.members[slot] for slot in slots)
    rung = "rejoin" if not slots else "respawn" if started else "spare"
    plan = EpochPlan(standing.epoch + 1, tuple(members), lost, verdict.line, verdict.at, rung)
    step, own = max(found.step, standing.step), sorted(set(found.lines.values()))
    after = Standing(plan.epoch, plan.members, tuple(nodes), spares, number, step, tries + 1, (*lines, *own))
    return Rung(plan, after, started)


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
