"""Programs with one mistake, for tests of the check and of what it accepts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from pentad.configs.tables.schedules import SCHEDULES
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.offload import offload, windows
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced

KINDS = ("dropped", "retargeted", "swapped")


def sound_program(rng: random.Random) -> Program:
    """A lowered program of 2 to 4 ranks, without the update at its end.

    Any schedule, balanced where it can be, some activations on the host in between.
    """
    program = _without_offload(rng)
    if rng.random() < 0.5:
        return program
    times = Times(offload=(rng.choice((0.1, 0.7)),), reload=(rng.choice((0.1, 0.7)),), one_engine=rng.random() < 0.5)
    return offload(program, [window.pass_ for mine in windows(program, times) for window in mine][::2], times)


def _without_offload(rng: random.Random) -> Program:
    name = rng.choice(list(SCHEDULES))
    ranks, microbatches = rng.choice((2, 3, 4)), rng.randint(1, 9)
    chunks = SCHEDULES[name].chunks or rng.choice((1, 2))
    if SCHEDULES[name].balanced and rng.random() < 0.5:
        barriers = rng.choice((1, 2))
        return lower(balanced(name, ranks=ranks, microbatches=microbatches, chunks=chunks, barriers=barriers))
    return lower(generate(name, ranks=ranks, microbatches=microbatches, chunks=chunks))


def broken_programs(seed: int, count: int) -> Iterator[tuple[str, Program]]:
    """`count` pairs of a kind and a program with one mistake of that kind, the kinds in turn.

    dropped: an operation is missing. retargeted: one has another microbatch, stage, slot or rank. swapped: two of a
    rank are exchanged, half of the time neighbours; such a program may still be a correct one.
    """
    rng = random.Random(seed)
    for n in range(count):
        program = sound_program(rng)
        kind = KINDS[n % len(KINDS)]
        lists = [list(ops) for ops in program.ranks]
        rank = rng.randrange(len(lists))
        ops = lists[rank]
        at = rng.randrange(len(ops))
        if kind == "dropped":
            del ops[at]
        elif kind == "retargeted":
            _retarget(rng, program, lists, rank, at)
        else:
            other = (at + 1) % len(ops) if rng.random() < 0.5 else rng.choice([k for k in range(len(ops)) if k != at])
            ops[at], ops[other] = ops[other], ops[at]
        yield kind, replace(program, ranks=tuple(tuple(ops) for ops in lists))


def _retarget(rng: random.Random, program: Program, lists: list[list[Op]], rank: int, at: int) -> None:
    op = lists[rank][at]
    targets = ["index", "rank"] + ["stage"] * (op.stage >= 0) + ["slot"] * (op.slot >= 0)
    target = rng.choice(targets)
    if target == "rank":
        del lists[rank][at]
        elsewhere = lists[rng.choice([r for r in range(len(lists)) if r != rank])]
        elsewhere.insert(rng.randint(0, len(elsewhere)), op)
        return
    size = {"index": program.microbatches, "stage": program.stages, "slot": 4}[target]
    value = rng.choice([v for v in range(size + 1) if v != getattr(op, target)])  # one more than there are, too
    lists[rank][at] = replace(op, **{target: value})
