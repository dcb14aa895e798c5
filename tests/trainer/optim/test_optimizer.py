"""Optimizers against torch.optim, schedules at their corners, and the guard against bad steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pentad.configs.errors import UserError
from pentad.configs.schema import AdamWConfig, ConstantSchedule, CosineSchedule, LinearSchedule, SgdConfig, WsdSchedule
from pentad.parallel.replicas.protocol import OptimizerShard
from pentad.trainer.optim.adamw_kernels import sum_of_squares
from pentad.trainer.optim.learning_rate import learning_rate
from pentad.trainer.optim.optimizer import UpdateScalars
from pentad.trainer.optim.states import make_optimizer
from tests.training import Run, job

CPU = torch.device("cpu")


def _units(dtype: torch.dtype, elements: tuple[int, int] = (50, 7)) -> list[OptimizerShard]:
    draws = torch.Generator().manual_seed(0)
    sizes = dict(zip(("matrix", "vector"), elements, strict=True))
    return [
        OptimizerShard(
            key, torch.randn(n, generator=draws, dtype=dtype), torch.zeros(n, dtype=dtype), None, key == "matrix", True
        )
        for key, n in sizes.items()
    ]


def _train(cfg, dtype: torch.dtype, *, skip_at: int = -1, factor: float = 0.5, steps: int = 5) -> list[torch.Tensor]:
    optimizer, units = make_optimizer(cfg, CPU), _units(dtype)
    for unit in units:
        optimizer.prepare(unit, None)
    draws, count = torch.Generator().manual_seed(1), torch.zeros(())
    for step in range(steps):
        for unit in units:
            unit.grad.copy_(torch.randn(unit.grad.shape, generator=draws, dtype=dtype))
        skip = torch.tensor(float(step == skip_at))
        if step == skip_at:
            units[0].grad[3] = math.nan
        count = count + (1 - skip)
        optimizer.step(units, UpdateScalars(0.01, torch.tensor(factor, dtype=dtype), skip, count))
    return [unit.value for unit in units]


def _torch(make, dtype: torch.dtype, *, steps: int = 5, skip_at: int = -1) -> list[torch.Tensor]:
    """The same by torch's own optimizer on halved gradients, leaving out the skipped step."""
    params = [torch.nn.Parameter(unit.value) for unit in _units(dtype)]
    optimizer = make(params)
    draws = torch.Generator().manual_seed(1)
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draws, dtype=dtype) * 0.5
        if step != skip_at:
            optimizer.step()
    return [param.detach() for param in params]


def _groups(params, decay: float) -> list[dict]:
    return [{"params": params[:1], "weight_decay": decay}, {"params": params[1:], "weight_decay": 0.0}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", ["fused", "foreach", "auto"])
@pytest.mark.parametrize("skip_at", [-1, 0, 2])
def test_adamw(impl, dtype, skip_at):
    cfg = AdamWConfig(impl=impl, weight_decay=0.1)
    expected = _torch(
        lambda p: torch.optim.AdamW(_groups(p, 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8), dtype, skip_at=skip_at
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for mine, theirs in zip(_train(cfg, dtype, skip_at=skip_at), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("skip_at", [-1, 0, 2])
def test_sgd(momentum, skip_at):
    expected = _torch(
        lambda p: torch.optim.SGD(_groups(p, 0.0), lr=0.01, momentum=momentum), torch.float64, skip_at=skip_at
    )
    found = _train(SgdConfig(momentum=momentum, weight_decay=0.0), torch.float64, skip_at=skip_at)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def test_apex_where_it_is_missing():
    with pytest.raises(UserError, match=r"optim\.impl=apex.*set optim\.impl=fused"):
        make_optimizer(AdamWConfig(impl="apex"), CPU)


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        (ConstantSchedule(warmup_steps=4), {0: 0.25, 3: 1.0, 99: 1.0}),
        (LinearSchedule(warmup_steps=0, min_ratio=0.2), {0: 1.0, 50: 0.6, 99: 0.208, 100: 0.2}),
        (CosineSchedule(warmup_steps=2, min_ratio=0.1), {0: 0.5, 1: 1.0, 2: 1.0, 51: 0.55, 100: 0.1}),
        (
            WsdSchedule(warmup_steps=2, decay_steps=10, min_ratio=0.0),
            {0: 0.5, 50: 1.0, 89: 1.0, 90: 10 / 11, 99: 1 / 11, 100: 0.0},
        ),
    ],
    ids=["constant", "linear", "cosine", "wsd"],
)
def test_schedules(schedule, at):
    for step, ratio in at.items():
        assert learning_rate(schedule, 2.0, step, 100) == pytest.approx(2 * ratio, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule, WsdSchedule])
def test_no_step_of_a_run_has_the_rate_zero(kind, steps):
    schedule = kind(min_ratio=0.0, **({"decay_steps": max(1, steps // 2)} if kind is WsdSchedule else {}))
    rates = [learning_rate(schedule, 1.0, step, steps) for step in range(steps)]
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(schedule, 1.0, steps, steps) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_bad_step_changes_nothing_and_is_reported(optim):
    cfg = job(optim=optim, dtype="fp32")
    good, bad = Run(0, cfg), Run(0, cfg)
    assert good.step(0) == bad.step(0)
    weight = bad.parts.model.get_parameter("layers.0.ffn.up.weight")
    before = [p.clone() for p in bad.parts.model.parameters()]
    healthy = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.inf
    assert bad.step(1)[2] == 1.0
    with torch.no_grad():
        weight[0, 0] = healthy
    for mine, theirs in zip(bad.parts.model.parameters(), before, strict=True):
        assert torch.equal(mine, theirs)
    assert bad.step(1) == good.step(1)  # as if it had never been


def test_clipping_uses_the_global_norm():
    cfg = replace(job(), optim=SgdConfig(lr=0.1, clip=0.5, weight_decay=0.0, schedule=ConstantSchedule()))
    run = Run(0, cfg)
    before = [p.clone() for p in run.parts.model.parameters()]
    _, norm, _ = run.step(0)
    assert norm > cfg.optim.clip
    moved = math.sqrt(
        sum(float((p - b).square().sum()) for p, b in zip(run.parts.model.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(0.1 * 0.5, rel=1e-5)  # 1e-6 stands under the norm


@pytest.mark.parametrize("elements", [0, 1, 1023, 1024, 5000, 3_000_001])
def test_the_norm_of_a_long_gradient_is_as_exact_as_that_of_a_short_one(elements: int) -> None:
    gradient = torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = gradient.double().square().sum()
    assert torch.isclose(sum_of_squares(gradient).double(), exact, rtol=1e-6, atol=0.0)


class _Made(TorchDispatchMode):
    """The elements of the largest tensor that operators make."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self._given, self.largest = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if found.untyped_storage().data_ptr() != self._given:
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_what_is_not_finite_is_found_without_a_mask_of_the_gradients_size(bad: float) -> None:
    gradient = torch.ones(1 << 20)
    gradient[12345] = bad
    with _Made(gradient) as made:
        total = sum_of_squares(gradient)
    assert made.largest <= gradient.numel() // 1024
    assert bool(torch.isfinite(total)) == (bad == 0.0)
