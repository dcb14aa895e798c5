"""In which order each rank computes, by the name of the schedule (`configs/tables/schedules.py` is their table).

An order has compute operations only (F and BW, or F, B and W); passes add the rest. Every order is correct for any
number of ranks and microbatches from 1 on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

from ....configs.errors import Problem, UserError
from ....configs.reading.program_file import read_frame
from ....configs.tables.schedules import (
    SCHEDULES,
    Schedule,
    default_chunks,
    find_schedule,
    is_program,
    schedule_problems,
)
from ..program import Program
from .base import Order, Orders, Shape

__all__ = ["Order", "Orders", "Schedule", "Shape", "generate", "order_of", "placement", "register"]


def register(schedule: Schedule) -> Callable[[Order], Order]:
    """Adds a schedule from outside: from then on its name is checked, simulated, drawn and trained like the others.

        @register(Schedule(name="all-at-once", text="all forward passes, then all backward passes"))
        def all_at_once(shape: Shape) -> Orders: ...

    Args:
        schedule: its row, without `order`.

    Returns:
        The decorator of the function that makes its order.

    Raises:
        ValueError: the name is taken.
    """

    def add(order: Order) -> Order:
        if schedule.name in SCHEDULES:
            raise ValueError(f"there is a schedule {schedule.name} already")
        SCHEDULES[schedule.name] = replace(schedule, order=order)
        return order

    return add


def order_of(name: str) -> Order:
    """The function that makes the order of the schedule called `name`."""
    order = SCHEDULES[name].order
    if not isinstance(order, str):
        return order
    module, _, function = order.partition(".")
    return getattr(import_module(f".{module}", __package__), function)


def placement(name: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank that holds each stage under the schedule called `name`, or in the program's file by that path.

    Raises:
        UserError: there is no such schedule, or program.
    """
    if is_program(name):
        return read_frame(name).placement
    once = tuple(range(ranks))
    return once + once[::-1] if find_schedule(name).placement == "vee" else once * chunks


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
    find_schedule(name)
    chunks = default_chunks(name) if chunks is None else chunks
    problems = schedule_problems(name, ranks=ranks, chunks=chunks, group=group)
    if microbatches < 1:
        problems.append(Problem("", f"{microbatches} microbatches are too few for a step; give at least 1"))
    if problems:
        raise UserError(*problems)
    shape = Shape(ranks, microbatches, chunks, ranks if group is None else group)
    return Program(microbatches, placement(name, ranks, chunks), order_of(name)(shape))
