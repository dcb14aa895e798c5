"""Where numbers that are not finite began is named, in every layout, and nothing of the look is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pentad.configs.schema import MoeConfig
from pentad.models.transformer import Layer
from pentad.trainer.metrics.metric import Alert
from pentad.trainer.numerics.bad_steps import BadSteps, DivergedError
from pentad.trainer.numerics.non_finite import NonFinite, find_non_finite, local_part
from tests.distributed import run_distributed
from tests.training import Run, job

MOE = MoeConfig(experts=4, top_k=2, ffn=32)
FAULTS = ("parameter", "output", "gradient")

LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "dp": {"dp": 2, "recompute": "full"},
    "fsdp": {"dp": 2, "sharding": "fsdp2"},
    "zero 2": {"dp": 2, "sharding": "deepspeed", "dtype": "fp32", "deepspeed": {"stage": 2}},
    "tp pp": {"tp": 2, "pp": 2, "sharding": "zero1"},
    "interleaved": {"pp": 2, "pipeline": {"schedule": "interleaved", "chunks": 2}, "model": {"layers": 4}},
    "split": {"pp": 2, "pipeline": {"schedule": "zb-h1"}, "recompute": "selective"},
    "vocabulary": {"pp": 2, "pipeline": {"vocab": "balanced"}},
    "cp": {"cp": 2},
    "ep": {"dp": 2, "ep": 2, "model": {"moe": MOE}},
}


QUICK = {
    ("tp pp", "output"),
    ("split", "gradient"),
    ("fsdp", "parameter"),
    ("vocabulary", "gradient"),
    ("ep", "output"),
}


def _case(layout: str, fault: str) -> Any:
    return pytest.param(layout, fault, marks=[] if (layout, fault) in QUICK else pytest.mark.slow)


@contextmanager
def broken(run: Run, fault: str, microbatch: int, times: int = 10**9) -> Iterator[None]:
    """One rank that has the last layer breaks something in it while it is at a microbatch."""
    name = f"{run.cfg.model.layers - 1}"
    holds = name in run.parts.model.layers and not (run.mesh.axis("tp").rank or run.mesh.axis("cp").rank)
    if not holds or run.mesh.axis("dp").rank != run.mesh.axis("dp").size - 1:
        yield
        return
    layer, left = run.parts.model.layers[name], [times]
    assert isinstance(layer, Layer)
    if fault == "parameter":
        with torch.no_grad():
            local_part(layer.attention_norm.get_parameter("weight"))[3] = torch.inf
        yield
        return

    def spoiled(x: Tensor) -> Tensor:
        hit = run.mesh.recorder.micro_batch == microbatch and left[0] > 0
        left[0] -= hit
        return x * torch.where(torch.arange(x.numel()).view(x.shape) == 5, torch.nan if hit else 1.0, 1.0)

    def after(module: nn.Module, given: Any, made: Tensor) -> Tensor | None:
        if fault == "output":
            return spoiled(made)
        if made.requires_grad and made.grad_fn is not None:
            made.register_hook(spoiled)
        return None

    handle = layer.attention.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _find(rank: int, world: int, wanted: dict[str, Any], fault: str) -> tuple[NonFinite | None, bool, list[float]]:
    run = Run(rank, job(**wanted, steps=2))
    try:
        with broken(run, fault, 1):
            result = run.issue(0)
            found = find_non_finite(run.stepper, 0, *run.batches(0))
        after = run.step(1) if fault != "parameter" else ()
        return found, bool(result.skipped), list(after)
    finally:
        run.close()


def _second(rank: int, world: int, wanted: dict[str, Any]) -> tuple[float, float, float]:
    """The second step alone, from the parameters at the start."""
    run = Run(rank, job(**wanted, steps=2))
    try:
        return run.step(1)
    finally:
        run.close()


@pytest.mark.parametrize(("layout", "fault"), [_case(layout, fault) for layout in LAYOUTS for fault in FAULTS])
def test_layer_module_microbatch_and_rank_are_named_in_every_layout(layout: str, fault: str) -> None:
    wanted = LAYOUTS[layout]
    cfg = job(**wanted)
    world, dp = cfg.parallel.ranks, cfg.parallel.dp or 1
    ranks = run_distributed(_find, world, wanted, fault, group=False)
    found, skipped, _ = ranks[0]
    assert all(rank[:2] == (found, skipped) for rank in ranks) and skipped and found is not None
    last = cfg.model.layers - 1
    assert found.layer == last and found.repeats
    if fault == "parameter":
        assert (found.during, found.module, found.tensor) == ("parameters", f"layers.{last}.attention_norm", "weight")
        assert found.value == "infinity"
        return
    assert found.value == "NaN" and found.microbatch == dp + dp - 1
    size = cfg.train.micro_batch
    assert found.samples == tuple(range(found.microbatch * size, (found.microbatch + 1) * size))
    # What spoils the gradient stands behind the look at attention's output: its last projection is the next to read it.
    expected = {
        "output": ("forward", "output", f"layers.{last}.attention"),
        "gradient": ("backward", "gradient of its input", f"layers.{last}.attention.out"),
    }
    assert (found.during, found.tensor, found.module) == expected[fault]
    # Nothing of the look is left: the next step is that of a run without it.
    clean = run_distributed(_second, world, wanted, group=False)
    assert [tuple(rank[2]) for rank in ranks] == clean


def _steps(rank: int, world: int, wanted: dict[str, Any], times: int) -> tuple[list[Alert | None], str]:
    """Alerts of two bad steps, then of one after a good one, and what the run ends with."""
    cfg = job(**wanted)
    run = Run(rank, replace(cfg, faults=replace(cfg.faults, max_bad_steps=2)))
    bad, alerts, error = BadSteps(run.cfg, run.stepper, {1: "node-7"}), list[Alert | None](), ""
    try:
        with broken(run, "output", 1, times):
            for step in (0, 1):
                skipped = bool(run.issue(step).skipped)
                alerts.append(bad.bad(step, *run.batches(step)) if skipped else None)
                try:
                    bad.check()
                except DivergedError as raised:
                    error = str(raised)
        return alerts, error
    finally:
        run.close()


def test_the_first_of_several_bad_steps_is_looked_at_and_the_error_says_where_it_began() -> None:
    (first, second), error = run_distributed(_steps, 2, LAYOUTS["dp"], 10**9, group=False)[0]
    assert second is None and first is not None and first.event == "non_finite"
    where = "NaN first in the output of layers.1.attention, forward pass, rank 1 on node-7, stage 0, microbatch 3"
    assert where in first.text and f"it began in step 1: {where}" in error and "2 steps in a row" in error
    assert first.fields | {"step": 1, "rank": 1, "host": "node-7", "layer": 1, "samples": [6, 7]} == first.fields


def test_a_fault_that_does_not_come_again_is_said_to_be_none_of_the_model() -> None:
    (first, second), error = run_distributed(_steps, 2, LAYOUTS["dp"], 1, group=False)[0]
    assert second is None and error == "" and first is not None
    assert "run again, the step is finite" in first.text and first.fields["repeats"] is False
    assert first.fields["tensor"].startswith("gradient of ") and first.fields["value"] == "NaN"
