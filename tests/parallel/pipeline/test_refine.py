"""A refined program is the same program with more stages: every other part of the room takes it as it is."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby

import pytest

from pentad.parallel.pipeline.check import check_program
from pentad.parallel.pipeline.kind import Acts
from pentad.parallel.pipeline.lower import forward_only, lower
from pentad.parallel.pipeline.memory import ActivationBytes, peak_bytes
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.offload import first_chunks, offload, windows
from pentad.parallel.pipeline.program import Op, Ops, Program
from pentad.parallel.pipeline.refine import part_stages, refine
from pentad.parallel.pipeline.schedules import SCHEDULES, generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced


def _random_program(rng: random.Random) -> Program:
    name = rng.choice([*SCHEDULES, "balanced", "evaluation"])
    ranks, microbatches = rng.choice((1, 2, 3, 4)), rng.randint(1, 7)
    if name == "balanced":
        return balanced(rng.choice(("1f1b", "gis", "v-half")), ranks=ranks, microbatches=microbatches)
    if name == "evaluation":
        return forward_only((*range(ranks), *range(ranks)), microbatches)
    return generate(name, ranks=ranks, microbatches=microbatches)


def _coarse(ops: Ops, parts: tuple[int, ...]) -> list[Op]:
    """A refined rank's compute with what stands for one operation taken together again."""
    stage_of = {part: stage for stage, mine in enumerate(part_stages(parts)) for part in mine}
    whole = [
        replace(op, stage=stage_of[op.stage]) if op.kind.acts is Acts.STAGE else op for op in ops if op.kind.computes
    ]
    found: list[Op] = []
    for op, together in groupby(whole):
        assert len(list(together)) == (parts[op.stage] if op.kind.acts is Acts.STAGE else 1)
        found.append(op)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_any_program_can_be_refined_before_and_after_lowering(seed: int) -> None:
    rng = random.Random(seed)
    program = _random_program(rng)
    parts = tuple(rng.randint(1, 4) for _ in range(program.stages))
    refined = refine(program, parts)
    assert refined.stages == sum(parts)
    assert [_coarse(ops, parts) for ops in refined.ranks] == [list(ops) for ops in program.ranks]
    for whole in (lower(refined), refine(lower(program), parts)):
        check_program(whole)
        assert [_coarse(ops, parts) for ops in whole.ranks] == [list(ops) for ops in program.ranks]
        assert Program.from_json(whole.to_json()) == whole


@pytest.mark.parametrize("name", SCHEDULES)
def test_part_stages_take_the_time_of_their_stage(name: str) -> None:
    program = lower(generate(name, ranks=4, microbatches=6))
    part, whole = Times(forward=(0.25,), backward=(0.25,), weight=(0.25,)), Times()
    refined = simulate(refine(program, (4,) * program.stages), part)
    assert refined.makespan == simulate(program, whole).makespan
    assert simulate(lower(refine(generate(name, ranks=4, microbatches=6), (4,) * program.stages)), part).makespan == (
        refined.makespan
    )


def test_a_program_with_offloads_is_refined_too() -> None:
    times = Times(offload=(0.1,), reload=(0.1,))
    program = lower(generate("po-h", ranks=2, microbatches=4), times=times)
    program = offload(program, first_chunks(program, 0.5), times)
    parts = (1, 3, 2, 2)
    refined = refine(program, parts)
    check_program(refined)
    stages = part_stages(parts)
    away = {(op.stage, op.index) for ops in program.ranks for op in ops if op.kind is Kinds.OFFLOAD}
    gone = {(op.stage, op.index) for ops in refined.ranks for op in ops if op.kind is Kinds.OFFLOAD}
    assert gone == {(part, index) for stage, index in away for part in stages[stage]}


def test_first_chunks_are_whole_chunks() -> None:
    parts = (1, 2, 3, 1)
    program = refine(generate("po-h", ranks=2, microbatches=1), parts)
    assert first_chunks(program, 0.5, parts) == [(0, 0), (1, 0), (2, 0)]
    assert len(first_chunks(program, 1.0, parts)) == 7


def test_without_a_pipeline_part_stages_give_copies_their_time() -> None:
    """One rank, eight layers: what a layer keeps is away while those behind it run forward and backward."""
    program = refine(generate("1f1b", ranks=1, microbatches=2), (8,))
    times = Times(offload=(0.5,), reload=(0.5,))
    check_program(program)
    chosen = [window.pass_ for window in windows(program, times)[0] if window.length > 4]
    done = offload(program, chosen, times)
    assert simulate(done, times).makespan == simulate(program, times).makespan
    sizes = ActivationBytes(activation=(1.0,))
    assert peak_bytes(program, sizes) == (8.0,) and peak_bytes(done, sizes)[0] <= 5


@pytest.mark.parametrize("parts", [(1,), (0, 1), (2, 1, 1)])
def test_numbers_that_do_not_fit_are_refused(parts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="part-stages of 2 stages"):
        refine(generate("1f1b", ranks=2, microbatches=2), parts)
