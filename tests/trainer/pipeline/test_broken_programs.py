"""Programs with two operations exchanged that the check still accepts: they must train like one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from pentad.configs.errors import UserError
from pentad.configs.schema import Config
from pentad.parallel.comm.mesh import Mesh
from pentad.parallel.pipeline.check import check_program
from pentad.parallel.pipeline.program import Program, update
from pentad.trainer.optim.states import Optimizer
from pentad.trainer.setup import Parts, buckets_per_rank
from pentad.trainer.step import Stepper
from tests.distributed import run_distributed
from tests.parallel.pipeline.broken import broken_programs
from tests.same_training import worst
from tests.training import Run, curve, job

LAYERS = 4


@cache
def _accepted(seed: int, count: int) -> list[Program]:
    found = []
    for kind, program in broken_programs(seed=seed, count=count):
        try:
            check_program(program)
        except UserError:
            continue
        assert kind == "swapped"
        found.append(program)
    return found


def _settings(program: Program) -> dict:
    """A job whose pipeline has the program's stages and vocabulary."""
    vee = program.chunks == 2 and program.placement[-1] == 0
    vocab = {"vocab": "balanced", "vocab_barriers": program.vocab_barriers} if program.vocab_barriers else {}
    schedule = "v-half" if vee else "gis"
    return {
        "pp": len(program.ranks),
        "pipeline": {"schedule": schedule, "chunks": program.chunks, **vocab},
        "model": {"layers": LAYERS, "vocab": 48},
        "micro_batch": 1,
        "global_batch": program.microbatches,
        "steps": 1,
    }


def _curve(rank: int, world: int, program: Program) -> list[tuple[float, float, float]]:
    """Two steps: what the first leaves behind would show in the second."""

    def make(cfg: Config, parts: Parts, optimizer: Optimizer, mesh: Mesh, _: Program) -> Stepper:
        buckets = buckets_per_rank(parts.replicas, mesh)
        lists = tuple(ops + update(count) for ops, count in zip(program.ranks, buckets, strict=True))
        return Stepper(cfg, parts, optimizer, mesh, replace(program, ranks=lists))

    run = Run(rank, job(**_settings(program)), stepper=make)
    try:
        return [run.step(0), run.step(1)]
    finally:
        run.close()


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_accepted_programs_train_the_same(ranks: int, every: int):
    programs = [program for program in _accepted(seed=3, count=300) if len(program.ranks) == ranks]
    assert len(programs) > 3
    programs = programs[::every]
    for program in programs:
        alone = job(**{**_settings(program), "pp": 1, "pipeline": None, "steps": 2})
        curves = run_distributed(_curve, ranks, program, group=False)
        assert worst(curves, curve(0, 1, alone)) < 1e-11
