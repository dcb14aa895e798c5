"""Programs with one mistake, for tests of the check and of what it accepts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pentad.configs.tables.schedules import SCHEDULES
from pentad.parallel.pipeline.kind import Role
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.offload import first_chunks, offload, windows
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.refine import refine
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


@dataclass(frozen=True)
class Sound:
    """What `broken_offloads` starts from: a schedule, ranks, stages per rank, microbatches, and part-stages of each."""

    schedule: str
    ranks: int
    chunks: int
    microbatches: int
    parts: int = 1

    def program(self, times: Times | None = None) -> Program:
        """Lowered, without offloads and without the update at its end."""
        plain = generate(self.schedule, ranks=self.ranks, microbatches=self.microbatches, chunks=self.chunks)
        return lower(refine(plain, (self.parts,) * plain.stages), times=times or Times())


OFFLOADED = {
    "po-h": Sound("po-h", 2, 2, 4),
    "po-f": Sound("po-f", 4, 2, 6),
    "1f1b": Sound("1f1b", 4, 1, 6),
    "gis": Sound("gis", 2, 2, 4),
    "v-half": Sound("v-half", 2, 2, 5),
    "parts": Sound("1f1b", 2, 1, 5, 3),
}
CHANGES = ("dropped", "doubled", "swapped", "moved", "retargeted", "elsewhere")


def offloaded_program(name: str, rng: random.Random) -> Program:
    """A lowered program of a schedule with some activations on the host, and half of the time some of those on a disk,
    without the update at its end."""
    sound = OFFLOADED[name]
    copies = (rng.choice((0.05, 0.3, 1.0)),)
    slow = (rng.choice((0.1, 1.0)),)
    times = Times(offload=copies, reload=copies, store=slow, fetch=slow, one_engine=rng.random() < 0.5)
    program = sound.program(times)
    always = first_chunks(program, SCHEDULES[sound.schedule].offloads, (sound.parts,) * (sound.ranks * sound.chunks))
    share = rng.choice((0.4, 0.8, 1.0))
    drawn = [window.pass_ for mine in windows(program, times) for window in mine if rng.random() < share]
    chosen = {*always, *drawn}
    on_disk = rng.choice((0.0, 0.7))
    return offload(program, chosen, times, stored=[each for each in sorted(chosen) if rng.random() < on_disk])


def broken_offloads(seed: int, count: int) -> Iterator[tuple[str, list[str], Program]]:
    """`count` programs with one to three mistakes, most of them in operations of the offload.

    Yields:
        The key in `OFFLOADED`, what was done to its program (`CHANGES`), and the program.
    """
    rng = random.Random(seed)
    names = list(OFFLOADED)
    for n in range(count):
        name = names[n % len(names)]
        program = offloaded_program(name, rng)
        # Most that may leave a program sound are exchanges of neighbours.
        changes: list[str] = rng.choices(CHANGES, (1, 1, 3, 3, 1, 1), k=rng.choices((1, 2, 3), (6, 3, 1))[0])
        lists = [list(ops) for ops in program.ranks]
        for change in changes:
            _change(rng, program, lists, change)
        yield name, changes, replace(program, ranks=tuple(tuple(ops) for ops in lists))


def _change(rng: random.Random, program: Program, lists: list[list[Op]], change: str) -> None:
    ops = rng.choice(lists)
    copies = [k for k, op in enumerate(ops) if op.kind.role in (Role.COPY, Role.MEMORY)]
    at = rng.choice(copies) if copies and rng.random() < 0.8 else rng.randrange(len(ops))
    other = (at + rng.choice((-2, -1, 1, 2))) % len(ops) if rng.random() < 0.7 else rng.randrange(len(ops))
    match change:
        case "dropped":
            del ops[at]
        case "doubled":
            ops.insert(other, ops[at])
        case "swapped":
            ops[at], ops[other] = ops[other], ops[at]
        case "moved":
            ops.insert(other, ops.pop(at))
        case "retargeted":
            op = ops[at]
            size = {"index": program.microbatches, "stage": program.stages, "slot": 4}
            target = rng.choice(list(size))
            ops[at] = replace(op, **{target: rng.choice([v for v in range(-1, size[target] + 1)])})
        case "elsewhere":
            to = rng.choice(lists)
            to.insert(rng.randint(0, len(to)), ops.pop(at))
