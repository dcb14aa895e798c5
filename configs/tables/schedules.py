"""The pipeline schedules: what each one is and can do, and every rule about the numbers that it takes. No torch.

The function that writes a schedule's order is in `parallel/pipeline/schedules`; a new schedule is that function and a
row here. A module outside the package adds both with `parallel.pipeline.schedules.register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import Problem, UserError, nearest

PROGRAM_SUFFIX = ".json"
"""Of paths that stand for a schedule's name: the file has the program itself."""
_SECTION = "parallel.pipeline"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule.

    Args:
        name: what users write.
        text: one line on what it does.
        order: what makes each rank's order: MODULE.FUNCTION in `parallel/pipeline/schedules`, or a function that
            `register` there was given.
        chunks: stages per rank, or None where the user chooses.
        placement: "straight", stage c·p + r on rank r, or "vee", stages r and 2p - 1 - r on rank r.
        splits: the input gradient (B) and the weight gradient (W) are separate operations.
        balanced: its order leaves time for the head (`Shape.delay`), so the vocabulary may be balanced over all ranks.
        group: of so many ranks: the fewest and the most (None: any) microbatches that pass a chunk before the next
            one; no function where microbatches do not pass in groups.
        offloads: of each rank's chunks the first ones, up to this share, are on the host between their forward and
            their backward passes.
        steady: more microbatches do not hold more memory, once every rank has some to do.
    """

    name: str
    text: str
    order: str | Callable[..., Any] = ""
    chunks: int | None = 1
    placement: Literal["straight", "vee"] = "straight"
    splits: bool = False
    balanced: bool = False
    group: Callable[[int], tuple[int, int | None]] | None = None
    offloads: float = 0.0
    steady: bool = False


_LIST = (
    Schedule(
        name="gpipe",
        text="all forward passes, then all backward passes",
        order="loops.gpipe",
    ),
    Schedule(
        name="1f1b",
        text="one forward, one backward: at most p microbatches in flight",
        order="loops.one_forward_one_backward",
        balanced=True,
        steady=True,
    ),
    Schedule(
        name="interleaved",
        text="1f1b over several chunks per rank: bubble divided by the chunks, more memory",
        order="loops.interleaved",
        chunks=None,
        balanced=True,
        group=lambda ranks: (ranks, None),
        steady=True,
    ),
    Schedule(
        name="gis",
        text="interleaved with split backward: less bubble, and no more memory than 1f1b",
        order="loops.grouped_split",
        chunks=None,
        splits=True,
        balanced=True,
        group=lambda ranks: (-(-ranks // 2), ranks),
        steady=True,
    ),
    Schedule(
        name="zb-h1",
        text="1f1b with late weight gradients: a third of its bubble at equal times, its memory on every rank",
        order="zero_bubble.h1",
        splits=True,
        steady=True,
    ),
    Schedule(
        name="zb-h2",
        text="twice the warm-up: at equal times no bubble within a rank, nearly twice the memory of 1f1b",
        order="zero_bubble.h2",
        splits=True,
        steady=True,
    ),
    Schedule(
        name="zb-v",
        text="at equal times no bubble within a rank, the memory of 1f1b on every rank",
        order="vee.zb_v",
        placement="vee",
        chunks=2,
        splits=True,
        steady=True,
    ),
    Schedule(
        name="v-half",
        text="half the memory of 1f1b on every rank, and less bubble",
        order="vee.v_half",
        placement="vee",
        chunks=2,
        splits=True,
        balanced=True,
        steady=True,
    ),
    Schedule(
        name="v-min",
        text="a third of the memory of 1f1b on every rank; its bubble grows with m where times are unequal",
        order="vee.v_min",
        placement="vee",
        chunks=2,
        splits=True,
        steady=True,
    ),
    Schedule(
        name="dualpipev",
        text="forward and backward passes in pairs, which the communication of experts can overlap",
        order="dual.dualpipev",
        placement="vee",
        chunks=2,
        splits=True,
        steady=True,
    ),
    Schedule(
        name="po-h",
        text="chunks at even distances, the first half of them offloaded to the host: a fraction of the memory of gis",
        order="uniform.uniform",
        chunks=None,
        splits=True,
        offloads=0.5,
        steady=True,
    ),
    Schedule(
        name="po-f",
        text="chunks at even distances, all of them offloaded: the least memory, if copies are as fast as the compute",
        order="uniform.uniform",
        chunks=None,
        splits=True,
        offloads=1.0,
        steady=True,
    ),
)

SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in _LIST}
"""By name, in the order in which they are listed to users."""


def find_schedule(name: str, key: str = f"{_SECTION}.schedule") -> Schedule:
    """The schedule called `name`, which was given with `key`.

    Raises:
        UserError: there is none.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    hint = nearest(name, SCHEDULES)
    tail = f"did you mean {hint}?" if hint else f"there are {', '.join(SCHEDULES)}"
    raise UserError(Problem(key, f"no schedule is called {name!r}; {tail}"))


def is_program(name: str | None) -> bool:
    """Whether the schedule is the path of a program's file instead of a name."""
    return name is not None and name.endswith(PROGRAM_SUFFIX)


def default_chunks(name: str) -> int:
    """Stages per rank where the user does not say: what the schedule needs, 2 where it leaves the choice."""
    return SCHEDULES[name].chunks or 2


def schedule_problems(
    name: str,
    *,
    ranks: int,
    chunks: int,
    group: int | None = None,
    barriers: int | None = None,
    called: Mapping[str, str] | None = None,
) -> list[Problem]:
    """Everything that the schedule called `name` cannot do.

    Args:
        name: one of `SCHEDULES`.
        ranks: of the pipeline axis, p.
        chunks: stages per rank, v.
        group: microbatches that pass a chunk before the next one; None: as the schedule has them.
        barriers: of a balanced vocabulary; None: it is at the ends.
        called: other words for keys, by key: the options of a command.
    """
    schedule, words = SCHEDULES[name], called or {}

    def key(leaf: str) -> str:
        return words.get(f"{_SECTION}.{leaf}", f"{_SECTION}.{leaf}")

    pp = words.get("parallel.pp", "parallel.pp")
    if ranks < 1:
        return [Problem(pp, f"must be at least 1, got {ranks}")]
    problems, this, because = [], f"{key('schedule')}={name}", f"{_SECTION}.schedule"
    if chunks < 1:
        problems.append(Problem(key("chunks"), f"must be at least 1, got {chunks}"))
    elif schedule.chunks not in (None, chunks):
        plural = "" if schedule.chunks == 1 else "s"
        instead = f"set {key('chunks')}={schedule.chunks} or {key('schedule')}=gis"
        message = f"{this} has {schedule.chunks} chunk{plural} per rank, got {chunks}; {instead}"
        problems.append(Problem(key("chunks"), message, (because,)))
    if barriers is not None and not schedule.balanced:
        able = ", ".join(sorted(row.name for row in SCHEDULES.values() if row.balanced))
        message = (
            f"balanced has no passes for {this}, only for {able}; set {key('vocab')}=ends or one of these schedules"
        )
        problems.append(Problem(key("vocab"), message, (because,)))
    if barriers not in (None, 1, 2):
        problems.append(Problem(key("vocab_barriers"), f"{barriers} is no algorithm; set 1 or 2"))
    if group is not None and schedule.group is None:
        able = " and ".join(sorted(row.name for row in SCHEDULES.values() if row.group is not None))
        message = f"only {able} have groups, not {this}, got {group}; leave it out"
        problems.append(Problem(key("group"), message, (because,)))
    if group is not None and schedule.group is not None:
        low, high = schedule.group(ranks)
        if group < low or (high is not None and group > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            message = f"must be {allowed} for {this} and {pp}={ranks}, got {group}; set {key('group')}={ranks}"
            problems.append(Problem(key("group"), message, ("parallel.pp", because)))
    return problems
