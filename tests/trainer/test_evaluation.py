"""The held-out loss: the same under every layout, and evaluating changes nothing of the training around it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from pentad.configs.schema import Config
from pentad.parallel.comm.collectives import all_reduce
from pentad.trainer.checkpoint.state import all_tensors
from pentad.trainer.pipeline.programs import evaluation_program
from tests.distributed import run_distributed
from tests.training import Run, job

LATE_S = 0.02


def _evaluate(run: Run, step: int) -> float:
    """Summed loss of the global batch of a step."""
    batches, _ = run.batches(step)
    program = evaluation_program(run.cfg, run.parts.pipeline, len(batches))
    total = run.stepper.evaluate(batches, program).double().reshape(1).clone()
    return all_reduce(total, run.mesh.axis("world")).wait().item()


def evaluated(rank: int, world: int, cfg: Config, masked: bool, late: int) -> list[float]:
    """Evaluation before, between and after two steps, with the steps' losses and norms; rank `late` is always late."""
    run = Run(rank, cfg, masked=masked)
    forward = run.stepper._runtime._forward

    def slow(stage: int, index: int, x: torch.Tensor | None) -> torch.Tensor:
        if not torch.is_grad_enabled():
            time.sleep(LATE_S)
        return forward(stage, index, x)

    if rank == late:
        run.stepper._forward = slow  # type: ignore[method-assign]
    try:
        found = [_evaluate(run, 7)]
        for step in range(2):
            found += run.step(step)[:2]
            found.append(_evaluate(run, 7))
            all_tensors(run.parts, run.optimizer)  # as a save does, which an evaluation must not be in the way of
        return found
    finally:
        run.close()


def _saved(rank: int, world: int, cfg: Config) -> bool:
    """Whether a checkpoint's tensors are the same before and after an evaluation, without a step between."""
    run = Run(rank, cfg)
    try:
        run.step(0)
        before = {name: t.local.clone() for name, t in all_tensors(run.parts, run.optimizer).items()}
        _evaluate(run, 7)
        after = all_tensors(run.parts, run.optimizer)
        return before.keys() == after.keys() and all(torch.equal(t.local, before[n]) for n, t in after.items())
    finally:
        run.close()


def _check(*, masked: bool = False, late: int = -1, **wanted: Any) -> None:
    """Against one process, to rounding."""
    cfg = job(**wanted)
    one = {"tp": 1, "pp": 1, "cp": 1, "dp": 1, "ep": 1, "etp": 1, "sharding": "ddp", "pipeline": None}
    alone = job(**{**wanted, **one, "recompute": "none"})
    p = cfg.parallel
    found = run_distributed(evaluated, p.ranks, cfg, masked, late, group=False)
    (expected,) = run_distributed(evaluated, 1, alone, masked, -1, group=False)
    assert expected[0] != expected[3] != expected[6]  # training moved it
    for mine in found:
        assert mine == pytest.approx(expected, rel=1e-11)


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("schedule", "chunks", "layers", "vocab"),
    [
        ("1f1b", 1, (2, 0, 2), "ends"),
        ("1f1b", 1, (2, 0, 2), "balanced"),
        ("gpipe", 1, (0, 0, 4), "ends"),
        ("zb-h1", 1, (4, 0, 0), "ends"),
        ("1f1b", 1, (0, 4, 0), "balanced"),
        ("interleaved", 2, (1, 0, 1, 0, 2, 0), "ends"),
        ("gis", 2, (0, 2, 0, 0, 0, 2), "balanced"),
        ("zb-v", 2, (1, 0, 0, 0, 2, 1), "ends"),
        ("v-half", 2, (1, 0, 0, 0, 2, 1), "balanced"),
        ("dualpipev", 2, (0, 1, 0, 1, 1, 1), "ends"),
    ],
)
def test_empty_stages_evaluate_and_train_like_one_process(schedule, chunks, layers, vocab):
    """Every rank's neighbours run ahead of the last one, so that what it has not read yet would be overwritten."""
    _check(
        pp=3,
        late=2,
        model={"layers": 4, "vocab": 48},
        pipeline={"schedule": schedule, "chunks": chunks, "layers": layers, "vocab": vocab},
        micro_batch=1,
        global_batch=8,
    )


@pytest.mark.sample(3)
@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "zero1", "fsdp2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tp": 2, "recompute": "full", "masked": True},
        {"cp": 2, "masked": True},
        {"model": {"tied": True, "mtp": 1}, "masked": True},
    ],
    ids=["plain", "tp-recompute-documents", "cp-documents", "tied-mtp"],
)
def test_evaluation_goes_with_every_sharding(sharding, settings):
    """Before the first step, between steps and before what a checkpoint reads."""
    _check(dp=2, sharding=sharding, **settings)


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("sharding", ["ddp", "zero1", "fsdp2"])
def test_evaluation_leaves_what_a_checkpoint_holds_as_it_was(sharding, dtype):
    assert run_distributed(_saved, 2, job(dp=2, sharding=sharding, dtype=dtype), group=False) == [True, True]
