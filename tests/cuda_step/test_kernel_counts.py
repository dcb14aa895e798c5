"""How much a layer asks of a GPU: budgets of kernels, which may only fall, and the FLOPs that are counted for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton")

from pentad.models.costs.flops import flops_per_step
from tests.cuda_step.jobs import LENGTH, make_batch, make_job, uneven_ends
from tests.cuda_step.step import trace_step
from tests.cuda_step.trace import Trace

DENSE = {"llama3.2_1b": 40, "qwen3_0.6b": 46, "llama2_7b": 40, "mistral_7b": 40}
"""Kernels of a layer and microbatch, forward and backward."""

EXPERTS = {"mixtral_8x7b": 89, "qwen3_30b_a3b": 83, "deepseek_v2_lite": 135}


def _traces(folder: Path, preset: str, *overrides: str, documents: bool = False) -> tuple[Trace, Trace]:
    """Of three layers and of two, whose difference is one layer."""
    jobs = [make_job(folder, preset, f"model.layers={layers}", *overrides) for layers in (3, 2)]
    three, two = (trace_step(cfg, partial(make_batch, documents=documents), uneven_ends(cfg)) for cfg in jobs)
    return three, two


def _of_models(trace: Trace) -> int:
    """Without the optimizer and the norm of its gradients, which come once a step."""
    step = ("trainer.optim", "trainer.step:Stepper._norm")
    return sum(not kernel.place.startswith(step) for kernel in trace.kernels)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("preset", DENSE)
def test_a_dense_layer_keeps_its_budget_of_kernels(tmp_path: Path, preset: str, documents: bool) -> None:
    three, two = _traces(tmp_path, preset, "train.kernels=triton", "train.global_batch=1", documents=documents)
    assert _of_models(three) - _of_models(two) <= DENSE[preset]


@pytest.mark.parametrize("preset", EXPERTS)
def test_a_layer_of_experts_keeps_its_budget_of_kernels(tmp_path: Path, preset: str) -> None:
    three, two = _traces(tmp_path, preset, "train.kernels=triton", "train.global_batch=1")
    assert _of_models(three) - _of_models(two) <= EXPERTS[preset]


@pytest.mark.parametrize("preset", DENSE)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_products_of_a_layer_are_the_flops_that_are_counted(tmp_path: Path, preset: str, kernels: str) -> None:
    three, two = _traces(tmp_path, preset, f"train.kernels={kernels}")
    products = [sum(each.flops for each in trace.kernels if "product" in each.kind) for trace in (three, two)]
    costs = []
    for layers in (3, 2):
        cfg = make_job(tmp_path, preset, f"model.layers={layers}")
        costs.append(flops_per_step(cfg.model, 2 * LENGTH, 0.0))
    assert products[0] - products[1] == costs[0] - costs[1]
