"""Training with activations on the host gives the bits of training without, in every layout (DESIGN invariant 1)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest

from pentad.configs.schema import Config, MoeConfig, RouterConfig
from pentad.trainer.pipeline import host_copies
from tests.distributed import run_distributed
from tests.slow_lane import SlowLane
from tests.training import curve, job

# More elements than `saved.SMALL` in what layers save.
SIZE: dict[str, Any] = {"steps": 3, "seq_len": 64, "global_batch": 16}
EXPERTS = MoeConfig(experts=8, top_k=2, ffn=32, router=RouterConfig(selection_bias=True, bias_rate=0.01))
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tp": {"tp": 2},
    "1f1b": {"pp": 2, "dp": 2, "model": {"layers": 4}},
    "1f1b-balanced": {"pp": 4, "model": {"layers": 4}, "pipeline": {"schedule": "1f1b", "vocab": "balanced"}},
    "gis-balanced": {
        "pp": 2,
        "tp": 2,
        "model": {"layers": 4},
        "pipeline": {"schedule": "gis", "chunks": 2, "vocab": "balanced"},
    },
    "v-half": {"pp": 2, "cp": 2, "model": {"layers": 4}, "pipeline": {"schedule": "v-half", "chunks": 2}},
    "po-h": {"pp": 2, "dp": 2, "model": {"layers": 4}, "pipeline": {"schedule": "po-h", "chunks": 2}},
    "experts": {"dp": 4, "ep": 4, "model": {"moe": EXPERTS}},
    "experts-in-a-pipeline": {
        "pp": 2,
        "dp": 2,
        "ep": 2,
        "model": {"moe": EXPERTS, "layers": 4},
        "pipeline": {"schedule": "zb-h1"},
    },
}


def _late(rank: int, world: int, cfg: Config, seed: int) -> list[tuple[float, float, float]]:
    """The curve with copies that are late and end in any order."""
    with mock.patch.object(host_copies, "Lane", partial(SlowLane, seed=1000 * seed + rank)):
        return curve(rank, world, cfg)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["po-h", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v-half", "experts-in-a-pipeline"))]
)
def test_copies_that_are_late_and_end_in_any_order_change_nothing(name: str) -> None:
    cfg = job(**{**SIZE, **LAYOUTS[name], "offload": "all", "steps": 2})
    ranks = cfg.parallel.ranks
    plain = run_distributed(curve, ranks, cfg, group=False)
    for seed in range(3):
        assert run_distributed(_late, ranks, cfg, seed, group=False) == plain


ALWAYS = {("alone", "none"), ("gis-balanced", "none"), ("po-h", "none"), ("experts-in-a-pipeline", "full")}
"""Run by `make test` too."""


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        pytest.param(name, recompute, marks=() if (name, recompute) in ALWAYS else pytest.mark.slow)
        for name in LAYOUTS
        for recompute in ("none", "full")
    ],
)
def test_curves_are_bit_equal(name: str, recompute: str) -> None:
    wanted = {**SIZE, **LAYOUTS[name], "recompute": recompute}
    cfg = job(**wanted)
    world = cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp * (cfg.parallel.dp or 1)
    curves = {}
    for share in ("none", "all", 0.5, "auto") if recompute == "none" else ("none", "all"):
        this = replace(cfg, memory=replace(cfg.memory, offload_activations=share))
        curves[share] = run_distributed(curve, world, this, group=False)
    assert all(each == curves["none"] for each in curves.values())
    first, *_, last = curves["none"][0]
    assert last[0] < first[0] and last[2] == 0.0
