"""Who is to blame: the wait-for graph over where all ranks stand (FT-HSDP, arXiv 2602.00277; ByteRobust).

A rank that waits for a collective waits for the members that have not begun it; one that waits for a transfer, for its
peer. Whoever is waited for and waits for nobody is a cause. Where everybody waits for somebody, the ranks do not make
the same calls: `astray.py` says which one differs from those that should do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from ...configs.strict_json import expect_int, expect_list, expect_number, expect_object, expect_text
from .astray import find_astray
from .stand import TRANSFERS, Call, Condition, Stand
from .verdict_words import Places, detail_lines, hang_line

KILLED, ENDED, LOST_NODE, STOPPED, FROZEN, FAILED = "killed", "ended", "lost node", "stopped", "frozen", "failed"
HANG, LIVELOCK, DATA_STALL, DATA_LIVELOCK, CHECKPOINT = "hang", "livelock", "data stall", "data livelock", "checkpoint"
DEADLOCK, LINK, OUT_OF_MEMORY = "deadlock", "link", "out of memory"
_SPINS = 0.6
"""Share of a core above which a thread that gets nowhere is busy rather than waiting."""


@dataclass(frozen=True)
class Verdict:
    """Why a job ends.

    Args:
        kind: what sort of failure.
        ranks: the causes.
        line: in one line, what happened, where, to whom.
        details: who waits for what, and stacks.
        step: that was under way.
        code: exit code of the job.
        at: Unix time.
    """

    kind: str
    ranks: tuple[int, ...]
    line: str
    details: tuple[str, ...] = ()
    step: int = 0
    code: int = 1
    at: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def load(value: object) -> Verdict:
        """What `as_dict` made, from JSON.

        Raises:
            JsonError: something else.
        """
        known = expect_object(value, "a verdict", Verdict.__dataclass_fields__)
        return Verdict(
            expect_text(known["kind"], "kind"),
            tuple(expect_int(rank, "a rank") for rank in expect_list(known["ranks"], "ranks")),
            expect_text(known["line"], "line"),
            tuple(expect_text(line, "a line") for line in expect_list(known["details"], "details")),
            expect_int(known["step"], "step", -1),
            expect_int(known["code"], "code", 0, 255),
            expect_number(known["at"], "at"),
        )


def diagnose(stands: Mapping[int, Stand], places: Places, *, impatient: bool = False) -> Verdict | None:
    """The cause of what the ranks are in; None: nothing is wrong, or whoever is waited for still has time.

    Args:
        stands: of all ranks, or of those that could be read.
        places: words for operations.
        impatient: take whoever is waited for, late or not: a post mortem, or a wait that ran out of time.
    """
    broken = [stand for stand in stands.values() if stand.broken]
    if broken:
        return _broken(broken, stands, places)
    graph = {
        rank: waits_for_ranks(stand, stands) for rank, stand in stands.items() if stand.condition is Condition.RUNS
    }
    late = [rank for rank in graph if stands[rank].late or impatient]
    writers = _writers(stands, impatient)
    if writers:
        return _verdict(CHECKPOINT, writers, stands, places)
    sinks, circle = _sinks(late, graph)
    if len(stands) < places.world:  # whoever waits for a rank of which nothing is known is no end of a chain
        sinks, circle = [rank for rank in sinks if stands[rank].waits is None], []
    causes = [stands[rank] for rank in sinks if stands[rank].late or impatient]
    gave_up = any(stand.condition is Condition.LOST for stand in stands.values())
    if circle or gave_up or (sinks and all(stands[rank].waits is not None for rank in sinks)):
        found = find_astray(stands, places)
        if found is not None:
            ranks, kind, line = found
            return Verdict(kind, ranks, line, detail_lines(stands, set(ranks), places), _step(stands))
    if causes:
        return _verdict(_sort(causes[0]), [each for each in causes if _sort(each) == _sort(causes[0])], stands, places)
    if circle and not sinks:
        return _verdict(DEADLOCK, [stands[rank] for rank in circle], stands, places)
    return None


def waits_for_ranks(stand: Stand, stands: Mapping[int, Stand]) -> list[int]:
    """The ranks that a rank waits for; empty where it waits for none."""
    call = stand.waits
    if call is not None and call.kind == "wait":  # for a lane, thus for the oldest that the lane has under way
        under_way = [each for each in stand.calls if each.open and each.axis == call.axis]
        call = min(under_way, key=lambda each: each.at, default=None)
    if call is None:
        return []
    others = [call.peer] if call.kind in TRANSFERS else list(stand.members.get(call.axis, ()))
    others = [rank for rank in others if rank != stand.rank and rank in stands]
    absent = [rank for rank in others if _begun(stands[rank], stand.rank, call) <= call.seq]
    if absent:
        return absent
    # All have begun it: whoever does not wait for it as well has not come back to it.
    return [rank for rank in others if stands[rank].broken or not _waits_for(stands[rank], stand.rank, call)]


def _begun(other: Stand, me: int, call: Call) -> int:
    """How many calls `other` has begun of those among which is the other side of `call`."""
    if call.kind not in TRANSFERS:
        return other.entered.get(call.key, 0)
    kind = TRANSFERS[1 - TRANSFERS.index(call.kind)]
    return other.entered.get((call.axis, call.group, kind, me), 0)


def _waits_for(other: Stand, me: int, call: Call) -> bool:
    mine = other.waits
    if mine is None:
        return False
    if call.kind in TRANSFERS:
        return True  # a rank that waits for anything reads, and shows, what is there for others
    return mine.kind == "wait" or (mine.axis, mine.seq) == (call.axis, call.seq) or not _holds(other, call)


def _holds(other: Stand, call: Call) -> bool:
    """Whether another rank has not done its part of a collective that it has begun."""
    return any(each.open and each.key == call.key and each.seq == call.seq for each in other.calls)


def _sinks(start: Iterable[int], graph: Mapping[int, list[int]]) -> tuple[list[int], list[int]]:
    """The ranks that somebody waits for, at the end of every chain, and which wait for nobody; and a circle."""
    seen: dict[int, None] = {}
    todo = list(start)
    while todo:
        rank = todo.pop()
        if rank not in seen:
            seen[rank] = None
            todo += graph.get(rank, [])
    sinks = [rank for rank in seen if not graph.get(rank)]
    return sorted(sinks), _circle(seen, graph)


def _circle(ranks: Iterable[int], graph: Mapping[int, list[int]]) -> list[int]:
    """A circle of ranks that wait for each other; empty where there is none."""
    for first in sorted(ranks):
        path, rank = [first], first
        while graph.get(rank):
            rank = min(graph[rank])
            if rank in path:
                return path[path.index(rank) :]
            path.append(rank)
    return []


def _sort(stand: Stand) -> str:
    if stand.phase == "data":
        return DATA_LIVELOCK if max(stand.data_busy, stand.busy if not stand.data_s else 0.0) > _SPINS else DATA_STALL
    if stand.waits is not None:
        return LINK
    return LIVELOCK if stand.busy > _SPINS else HANG


def _writers(stands: Mapping[int, Stand], impatient: bool) -> list[Stand]:
    """The ranks whose save is stuck while others wait for it."""
    saving = [each for each in stands.values() if each.writer_s]
    blocked = [each for each in stands.values() if each.phase == "save" and (each.late or impatient)]
    stuck = [each for each in saving if not each.writer_waits]
    if not blocked or not stuck:
        return []
    least = min(each.writer_stage for each in saving)
    return [each for each in stuck if each.writer_stage == least]


def _broken(broken: list[Stand], stands: Mapping[int, Stand], places: Places) -> Verdict:
    order = [Condition.DEAD, Condition.FAILED, Condition.GONE, Condition.STOPPED, Condition.FROZEN]
    first = min((each.condition for each in broken), key=order.index)
    causes = [each for each in broken if each.condition is first]
    causes = [each for each in causes if each.starved] or causes  # others may have died of its death
    code = causes[0].code or 0
    kind = {
        Condition.DEAD: _death(causes[0]),
        Condition.FAILED: FAILED,
        Condition.GONE: LOST_NODE,
        Condition.STOPPED: STOPPED,
        Condition.FROZEN: FROZEN,
    }[first]
    return _verdict(kind, causes, stands, places, 128 - code if code < 0 else code or 1)


def _death(stand: Stand) -> str:
    if stand.starved:
        return OUT_OF_MEMORY
    return KILLED if stand.code is None or stand.code < 0 else ENDED


def _verdict(kind: str, causes: list[Stand], stands: Mapping[int, Stand], places: Places, code: int = 1) -> Verdict:
    ranks = tuple(sorted(each.rank for each in causes))
    details = detail_lines(stands, set(ranks), places)
    return Verdict(kind, ranks, hang_line(kind, causes, places), details, _step(stands), code)


def _step(stands: Mapping[int, Stand]) -> int:
    return max((stand.at[0] for stand in stands.values()), default=0) + 1
