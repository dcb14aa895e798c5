"""The schedules, by name: in which order each rank computes.

A schedule writes compute operations only (F and BW, or F, B and W); passes add the rest. Every order is correct for
any number of ranks and microbatches from 1 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ....configs.errors import Problem, UserError
from ....configs.fields import nearest
from ..program import Program
from . import dual, loops, vee, zero_bubble
from .base import Schedule, Shape

__all__ = ["SCHEDULES", "Schedule", "generate", "placement"]

_LIST = (
    Schedule(
        "gpipe",
        orders=loops.gpipe,
        description="all forward passes, then all backward passes",
    ),
    Schedule(
        "1f1b",
        orders=loops.one_forward_one_backward,
        balanced=True,
        description="one forward, one backward: at most p microbatches in flight",
    ),
    Schedule(
        "interleaved",
        orders=loops.interleaved,
        chunks=None,
        balanced=True,
        description="1f1b over several chunks per rank: bubble divided by the chunks, more memory",
    ),
    Schedule(
        "gis",
        orders=loops.grouped_split,
        chunks=None,
        splits=True,
        balanced=True,
        description="interleaved with split backward: less bubble, and no more memory than 1f1b",
    ),
    Schedule(
        "zb-h1",
        orders=zero_bubble.h1,
        splits=True,
        description="1f1b with late weight gradients: a third of its bubble at equal times, its memory on every rank",
    ),
    Schedule(
        "zb-h2",
        orders=zero_bubble.h2,
        splits=True,
        description="twice the warm-up: at equal times no bubble within a rank, nearly twice the memory of 1f1b",
    ),
    Schedule(
        "zb-v",
        orders=vee.zb_v,
        placement="vee",
        chunks=2,
        splits=True,
        description="at equal times no bubble within a rank, the memory of 1f1b on every rank",
    ),
    Schedule(
        "v-half",
        orders=vee.v_half,
        placement="vee",
        chunks=2,
        splits=True,
        balanced=True,
        description="half the memory of 1f1b on every rank, and less bubble",
    ),
    Schedule(
        "v-min",
        orders=vee.v_min,
        placement="vee",
        chunks=2,
        splits=True,
        description="a third of the memory of 1f1b on every rank; its bubble grows with m where times are unequal",
    ),
    Schedule(
        "dualpipev",
        orders=dual.dualpipev,
        placement="vee",
        chunks=2,
        splits=True,
        description="forward and backward passes in pairs, which the communication of experts can overlap",
    ),
)

SCHEDULES: Mapping[str, Schedule] = MappingProxyType({schedule.name: schedule for schedule in _LIST})


def placement(name: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank that holds each stage under the schedule called `name`."""
    once = tuple(range(ranks))
    return once + once[::-1] if find(name).placement == "vee" else once * chunks


def find(name: str) -> Schedule:
    """The schedule called `name`.

    Raises:
        UserError: there is none.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    hint = nearest(name, SCHEDULES)
    tail = f"did you mean {hint}?" if hint else f"there are {', '.join(SCHEDULES)}"
    raise UserError(Problem("parallel.pipeline.schedule", f"no schedule is called {name!r}; {tail}"))


def generate(
    name: str, *, ranks: int, microbatches: int, chunks: int | None = None, group: int | None = None
) -> Program:
    """The compute operations of one training step.

    Args:
        name: of the schedule.
        ranks: of the pipeline axis, p.
        microbatches: per step, m; any number from 1 on.
        chunks: stages per rank, v. By default what the schedule needs, 2 where it leaves the choice.
        group: interleaved and gis only: how many microbatches a chunk takes in turn, by default p. interleaved needs
            at least p; gis takes ⌈p/2⌉ to p, where fewer keep fewer activations and make more bubble.

    Raises:
        UserError: no such schedule, or a number that does not fit it.
    """
    schedule = find(name)
    problems = []
    if ranks < 1:
        problems.append(Problem("parallel.pp", f"{ranks} is no number of ranks; set at least 1"))
    if microbatches < 1:
        problems.append(Problem("", f"{microbatches} microbatches are too few for a step; give at least 1"))
    chunks = chunks if chunks is not None else schedule.chunks or 2
    problems += [p for p in (_chunks_problem(schedule, chunks), _group_problem(schedule, ranks, group)) if p]
    if problems:
        raise UserError(*problems)
    shape = Shape(ranks, microbatches, chunks, ranks if group is None else group)
    return Program(microbatches, placement(name, ranks, chunks), schedule.orders(shape))


def _chunks_problem(schedule: Schedule, chunks: int) -> Problem | None:
    key = "parallel.pipeline.chunks"
    if chunks < 1:
        return Problem(key, f"{chunks} is no number of stages per rank; set at least 1")
    if schedule.chunks in (None, chunks):
        return None
    free = ", ".join(s.name for s in SCHEDULES.values() if s.chunks is None)
    return Problem(
        key, f"{schedule.name} has {schedule.chunks} per rank, not {chunks}; set {schedule.chunks}, or {free}"
    )


def _group_problem(schedule: Schedule, ranks: int, group: int | None) -> Problem | None:
    if group is None or ranks < 1:
        return None
    key = "parallel.pipeline.group"
    if schedule.name == "gis":
        least = -(-ranks // 2)
        if not least <= group <= ranks:
            return Problem(key, f"{group} does not fit gis on {ranks} ranks; set {least} to {ranks}")
    elif schedule.name == "interleaved":
        if group < ranks:
            return Problem(key, f"{group} is less than the {ranks} ranks; set at least {ranks}")
    else:
        return Problem(key, f"{schedule.name} has no groups of microbatches; leave it out (given: {group})")
    return None
