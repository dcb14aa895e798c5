"""Where a rank stands, read from its ring: what a diagnosis is made of. Small enough to be sent to another node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from . import kinds
from .reader import RecordRing
from .ring import BESIDE
from .vitals import (
    AT_STEP_WORD,
    AT_WORD,
    DATA_SINCE_WORD,
    EPOCH_WORD,
    PHASE_WORD,
    PHASES,
    SINCE_WORD,
    WAITS_WORD,
    WRITER_SINCE_WORD,
    WRITER_STAGE_WORD,
    WRITER_WAITS_WORD,
)

TRANSFERS = ("send", "receive")
MOST_CALLS = 4000
"""Of the step under way and the one before; of larger steps the newest."""


class Condition(StrEnum):
    """What the kernel, or silence, says of a rank's process."""

    RUNS = "runs"
    DEAD = "dead"
    """It ended without a word."""
    GONE = "gone"
    """Its node cannot be reached any more."""
    STOPPED = "stopped"
    """By SIGSTOP or a debugger."""
    FROZEN = "frozen"
    """It runs and gives no sign of life: something holds the interpreter."""
    FAILED = "failed"
    """It ends of an error of its own."""
    LOST = "lost"
    """It ends because it lost another rank."""
    DONE = "done"
    """It has ended in good order."""


@dataclass(frozen=True)
class Call:
    """A communication of a rank: of a collective over `axis`, or a transfer with `peer`; `kind` "wait": for a lane.

    `seq` numbers the collectives of an axis, and the transfers of a kind with a peer; `at` is when it began, in ns;
    `beside`: not by the step's own thread.
    """

    kind: str
    axis: str
    group: int
    peer: int
    seq: int
    nbytes: int
    step: int
    micro_batch: int
    op: int
    open: bool
    at: int
    beside: bool = False

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What `seq` counts within."""
        transfer = self.kind in TRANSFERS
        return self.axis, self.group, self.kind if transfer else "", self.peer if transfer else -1


@dataclass(frozen=True)
class Stand:
    """Where a rank stands.

    Args:
        rank, host, pid: which.
        condition: of its process.
        phase, phase_s: what its main thread is at, and for how long.
        idle_s: seconds without progress.
        late: whether that is longer than its phase allows.
        at: step, microbatch and operation.
        waits: the communication that the main thread waits for.
        entered: how many communications it has begun, by `Call.key`.
        calls: of the step under way and the one before, in their order.
        members: the ranks of each axis.
        data_s: since when its thread prepares the current microbatch; 0: it does not.
        data_busy: the share of a core that this takes.
        writer_s, writer_stage, writer_waits: since when its save is being written, how far that is, and whether it
            waits for the other ranks.
        busy: the share of a core that the main thread takes.
        code: exit code of a dead one, negative for a signal.
        line: the error of a failed one.
        starved: of one that the kernel killed for lack of memory, what there was too little of.
        stack: Python's, innermost frame first.
    """

    rank: int
    host: str = ""
    pid: int = 0
    condition: Condition = Condition.RUNS
    phase: str = "step"
    phase_s: float = 0.0
    idle_s: float = 0.0
    late: bool = False
    at: tuple[int, int, int] = (0, 0, -1)
    waits: Call | None = None
    entered: Mapping[tuple[str, int, str, int], int] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    data_s: float = 0.0
    data_busy: float = 0.0
    writer_s: float = 0.0
    writer_stage: int = 0
    writer_waits: bool = False
    busy: float = 0.0
    code: int | None = None
    line: str = ""
    starved: str = ""
    stack: tuple[str, ...] = ()

    @property
    def broken(self) -> bool:
        """Whether it does nothing more, whatever it was at."""
        return self.condition not in (Condition.RUNS, Condition.LOST, Condition.DONE)


def read_stand(ring: RecordRing, words: memoryview | np.ndarray, now: int, host: str) -> Stand:
    """What a ring and its header say, at a time of its host's monotonic clock (ns)."""
    codes = {name: code for code, name in enumerate(ring.names)}
    entries = ring.entries
    parts = [codes.get(kind, -1) for kind in (kinds.WAIT, kinds.COPY)]
    # Every mesh numbers its communications anew.
    here = entries["epoch"] == int(words[EPOCH_WORD])
    talks = entries[here & (entries["axis"] > 0) & ~np.isin(entries["kind"], parts)]
    last = entries[-1] if len(entries) else None
    step = int(entries["step"].max()) if last is not None else 0
    recent = talks[talks["step"] >= step - 1][-MOST_CALLS:]
    ticket = int(words[WAITS_WORD]) - 1
    waited = entries[entries["ticket"] == ticket] if ticket >= 0 else entries[:0]

    def since(word: int) -> float:
        return max(now - int(words[word]), 0) / 1e9 if words[word] else 0.0

    code = int(words[PHASE_WORD])
    return Stand(
        rank=ring.header.rank,
        host=host,
        pid=ring.header.pid,
        phase=PHASES[code] if 0 <= code < len(PHASES) else PHASES[0],
        phase_s=since(SINCE_WORD),
        at=_at(words, last, step),
        waits=_call(ring, waited[0]) if len(waited) else None,
        entered=_entered(ring, talks),
        calls=tuple(_call(ring, entry) for entry in recent),
        members=_members(ring.names),
        data_s=since(DATA_SINCE_WORD),
        writer_s=since(WRITER_SINCE_WORD),
        writer_stage=int(words[WRITER_STAGE_WORD]),
        writer_waits=bool(words[WRITER_WAITS_WORD]),
    )


def _at(words: memoryview | np.ndarray, last: np.void | None, step: int) -> tuple[int, int, int]:
    """Step, microbatch and operation: as the header shows, which is there before an operation's entry; outside all
    operations as of the last entry."""
    micro_batch, op = (int(last["micro_batch"]), int(last["op"])) if last is not None else (0, -1)
    if words[AT_WORD]:
        step, op = int(words[AT_STEP_WORD]), int(words[AT_WORD]) - 1
    return step, micro_batch, op


def _call(ring: RecordRing, entry: np.void) -> Call:
    return Call(
        kind=ring.name(entry["kind"]),
        axis=ring.name(entry["axis"]),
        **{name: int(entry[name]) for name in ("group", "peer", "seq", "nbytes", "step", "micro_batch", "op")},
        open=not entry["end"],
        at=int(entry["enqueued"]),
        beside=bool(entry["flags"] & BESIDE),
    )


def _entered(ring: RecordRing, talks: np.ndarray) -> dict[tuple[str, int, str, int], int]:
    """How many communications of each sort were begun."""
    found: dict[tuple[str, int, str, int], int] = {}
    if not len(talks):
        return found
    transfers = [code for code, name in enumerate(ring.names) if name in TRANSFERS]
    transfer = np.isin(talks["kind"], transfers)
    for rows, is_transfer in ((talks[~transfer], False), (talks[transfer], True)):
        names = ["axis", "group", "kind", "peer"] if is_transfer else ["axis", "group"]
        sorts, where = np.unique(rows[names], return_inverse=True)
        for place, sort in enumerate(sorts):
            count = int(rows["seq"][where == place].max()) + 1
            rest = (ring.name(sort["kind"]), int(sort["peer"])) if is_transfer else ("", -1)
            found[ring.name(sort["axis"]), int(sort["group"]), *rest] = count
    return found


def axis_members(axis: str, ranks: Sequence[int]) -> str:
    """The name by which a ring says who stands along an axis: `tp: 0-3:1`, runs of ranks from, to and by a stride."""
    runs, at = [], 0
    while at < len(ranks):
        stride = ranks[at + 1] - ranks[at] if at + 1 < len(ranks) else 1
        last = at
        while last + 1 < len(ranks) and ranks[last + 1] - ranks[last] == stride:
            last += 1
        runs.append(f"{ranks[at]}-{ranks[last]}:{stride}")
        at = last + 1
    return f"{axis}: {','.join(runs)}"


def _members(names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The ranks of each axis, from what `axis_members` wrote into the names."""
    found = {}
    for name in names:
        axis, colon, runs = name.partition(": ")
        if not colon:
            continue
        try:
            ranks: list[int] = []
            for run in runs.split(","):
                ends, stride = run.split(":")
                first, last = map(int, ends.split("-"))
                ranks += range(first, last + 1, int(stride))
        except ValueError:
            continue  # some other name, or one that was cut off
        found[axis] = tuple(ranks)
    return found
