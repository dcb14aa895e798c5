"""Balancing losses and selection biases are the same in every layout, and they matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pentad.configs.schema import MoeConfig, RouterConfig
from pentad.models.routing.balance import FIELDS
from tests.distributed import run_distributed
from tests.same_training import Trained, check, train
from tests.training import job

STEPS = 5
BALANCE: dict[str, dict[str, Any]] = {
    "micro_batch": {"aux_loss": 0.5, "z_loss": 0.05},
    "sequence": {"aux_loss": 0.5, "aux_level": "sequence", "score": "sigmoid"},
    "global_batch": {"aux_loss": 0.5, "aux_level": "global_batch", "z_loss": 0.05},
    "bias": {"score": "sigmoid", "selection_bias": True, "bias_rate": 0.02, "groups": 4, "groups_kept": 2},
    "null": {"null_experts": 4, "aux_loss": 0.5, "aux_level": "sequence", "jitter": 0.1, "selection_bias": True},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "dp2": {"dp": 2, "sharding": "zero1"},
    "pp2": {"pp": 2, "pipeline": {"schedule": "zb-h1"}},
    "tp2-dp2": {"tp": 2, "dp": 2, "ep": 4, "recompute": "full"},
    "pp2-tp2-chunks": {"pp": 2, "tp": 2, "pipeline": {"schedule": "gis", "chunks": 2}, "recompute": "full"},
}
ALWAYS = {("micro_batch", "tp2"), ("sequence", "dp2"), ("global_batch", "pp2"), ("bias", "pp2-tp2-chunks")}


def settings(router: dict[str, Any], **moe: Any) -> dict[str, Any]:
    """Four layers of eight experts, the first one dense."""
    found = MoeConfig(**{"experts": 8, "ffn": 24, "dense_layers": 1, **moe}, router=RouterConfig(**router))
    return {"model": {"layers": 4, "moe": found}, "steps": STEPS}


def alone(router: dict[str, Any], moe: dict[str, Any] | None = None, **train_settings: Any) -> Trained:
    """What one process has after the last step."""
    cfg = job(**{**settings(router, **(moe or {})), **train_settings})
    return run_distributed(train, 1, cfg, False, group=False)[0]


def field(trained: Trained, name: str) -> torch.Tensor:
    """(steps, layers)"""
    return torch.stack([step[:, FIELDS.index(name)] for step in trained.routed if step is not None])


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("balance", "layout"),
    [
        pytest.param(b, layout, marks=[] if layout == "tp2-dp2" or (b, layout) in ALWAYS else pytest.mark.slow)
        for b in BALANCE
        for layout in LAYOUTS
    ],
)
def test_layout(balance, layout):
    """Loss, norm, parameters, the losses' values in every step, and every buffer bit for bit."""
    ranks = check(**settings(BALANCE[balance]), **LAYOUTS[layout])
    biases = [buffer for name, buffer in ranks[0].buffers.items() if name.endswith("selection_bias")]
    assert all(bias.any() for bias in biases)
    assert bool(biases) == BALANCE[balance].get("selection_bias", False)
    if "aux_loss" in BALANCE[balance]:
        assert (field(ranks[0], "aux") > 0.5).all()


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("balance", ["sequence", "global_batch", "bias"])
def test_accumulation_changes_nothing(balance):
    """These do not know microbatches, and neither must the training."""
    expected = alone(BALANCE[balance], micro_batch=2)
    for size in (1, 8):
        found = alone(BALANCE[balance], micro_batch=size)
        for mine, theirs in zip(found.curve, expected.curve, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-11)
        for mine, theirs in zip(found.routed, expected.routed, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
        for name, buffer in found.buffers.items():
            assert torch.equal(buffer, expected.buffers[name])


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn"])
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_routers_that_see_the_whole_microbatch(name, dispatcher):
    """Ranks with different microbatches exchange tokens, of which some go to more experts than others."""
    wanted = settings({"name": name}, dispatcher=dispatcher)
    check(**wanted, tp=2, dp=2, ep=4, recompute="full")


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("drop", ["probability", "position"])
def test_capacity_of_the_whole_microbatch(drop):
    ranks = check(**settings({"aux_loss": 0.1}, capacity_factor=0.8, drop=drop), tp=2, dp=2, ep=2, recompute="full")
    assert (field(ranks[0], "dropped") > 0).all()


@pytest.mark.distributed
def test_local_capacity_depends_on_the_layout():
    """Which is why it is not the default."""
    wanted = settings({}, capacity_factor=0.8, capacity_scope="local")
    with pytest.raises(AssertionError):
        check(**wanted, tp=2)


@pytest.mark.slow
@pytest.mark.distributed
def test_losses_matter():
    """Training differs with each, the balancing loss evens out the load and the z-loss keeps logits small."""
    even = {"aux_loss": 0.5, "aux_level": "micro_batch"}
    long = {"steps": 25, "moe": {"dense_layers": 0}}
    without, balanced, small = alone({}, **long), alone(even, **long), alone({"z_loss": 0.2}, **long)
    for other in (balanced, small):
        assert abs(other.curve[-1][0] - without.curve[-1][0]) > 1e-6 * without.curve[-1][0]

    def unevenness(trained: Trained) -> float:
        loads = torch.stack([step[:, len(FIELDS) :] for step in trained.routed[-5:] if step is not None]).mean(0)
        return float((loads.max(-1).values / loads.mean(-1)).mean())

    assert unevenness(balanced) < unevenness(without)
    assert field(small, "z")[-1].mean() < 0.7 * field(without, "z")[-1].mean()


@pytest.mark.distributed
def test_every_level_is_another_loss():
    curves = [
        alone({"aux_loss": 0.5, "aux_level": level}).curve for level in ("micro_batch", "sequence", "global_batch")
    ]
    assert len({curve[-1][0] for curve in curves}) == 3
