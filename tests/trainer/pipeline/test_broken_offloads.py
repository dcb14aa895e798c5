"""Offloaded programs with random mistakes: the check rejects them, or they train like the sound one."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from pentad.parallel.pipeline.check import ProgramError, check_program
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Program, update
from pentad.trainer.checkpoint.state import units_by_key
from pentad.trainer.setup import buckets_per_rank
from pentad.trainer.step import Stepper
from tests.distributed import run_distributed
from tests.parallel.pipeline.broken import OFFLOADED, broken_offloads
from tests.training import Run, job

COUNT = 300


@cache
def _checked() -> tuple[dict[str, list[Program]], Counter[str]]:
    found: dict[str, list[Program]] = {name: [] for name in OFFLOADED}
    rejected: Counter[str] = Counter()
    for name, changes, program in broken_offloads(seed=11, count=COUNT):
        try:
            check_program(program)
        except ProgramError:
            rejected.update(changes)
            continue
        found[name].append(program)
    return found, rejected


def _settings(name: str) -> dict[str, Any]:
    sound = OFFLOADED[name]
    return {
        "pp": sound.ranks,
        "pipeline": {"schedule": "v-half" if name == "v-half" else "gis", "chunks": sound.chunks},
        "model": {"layers": sound.ranks * sound.chunks * sound.parts},
        "group": 1,
        "seq_len": 64,
        "micro_batch": 1,
        "global_batch": sound.microbatches,
        "memory": {"offload_disk": tempfile.gettempdir()},
    }


def _gradients(run: Run, program: Program) -> list[torch.Tensor]:
    """Loss, norm and gradients of two steps at a learning rate of 0: what the first leaves would show in the second."""
    buckets = buckets_per_rank(run.parts.replicas, run.mesh)
    lists = tuple(ops + update(count) for ops, count in zip(program.ranks, buckets, strict=True))
    stepper = Stepper(run.cfg, run.parts, run.optimizer, run.mesh, replace(program, ranks=lists))
    found: list[torch.Tensor] = []
    for _ in range(2):
        result = stepper.run(0, *run.batches(0), 0.0)
        found += [result.loss.clone(), result.grad_norm.clone()]
        found += [unit.grad.clone() for unit in units_by_key(run.parts.replicas).values()]
    if stepper._copies is not None:
        stepper._copies.close()
    return found


def _compared(rank: int, world: int, name: str, plain: Program, programs: list[Program]) -> list[tuple[float, bool]]:
    """Of each program the largest relative difference to the plain one, and whether the bits are the same."""
    run = Run(rank, job(**_settings(name)))
    try:
        expected, found = _gradients(run, plain), []
        for program in programs:
            pairs = list(zip(_gradients(run, program), expected, strict=True))
            worst = max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)
            found.append((worst, all(torch.equal(a, b) for a, b in pairs)))
        return found
    finally:
        run.close()


def _sums(program: Program) -> list[list[str]]:
    """What decides the order of sums: each rank's passes."""
    return [[str(op) for op in ops if op.kind.computes] for ops in program.ranks]


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("po-f", "gis") else ()) for name in OFFLOADED]
)
def test_accepted_offloads_train_the_same(name: str) -> None:
    programs = _checked()[0][name]
    assert len(programs) > 3
    plain = OFFLOADED[name].program()
    assert not any(op.kind is Kinds.OFFLOAD for ops in plain.ranks for op in ops)
    for of_rank in run_distributed(_compared, len(plain.ranks), name, plain, programs, group=False):
        for program, (difference, same) in zip(programs, of_rank, strict=True):
            # Bits, unless another order of passes makes another order of sums.
            assert same if _sums(program) == _sums(plain) else difference < 1e-12


def test_most_mistakes_are_rejected_and_every_sort_is_drawn() -> None:
    accepted, rejected = _checked()
    assert 0.6 * COUNT < COUNT - sum(map(len, accepted.values())) < 0.95 * COUNT
    assert min(rejected.values()) > 20 and len(rejected) == 6
