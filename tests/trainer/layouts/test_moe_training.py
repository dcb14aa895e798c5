"""Mixture-of-experts models train in every layout like one process (DESIGN invariant 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pentad.configs.schema import MoeConfig, RouterConfig
from tests.covering import Case, pairwise
from tests.same_training import check

STEPS = 5
ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "switch": {"normalize": False, "aux_loss": 0.1, "z_loss": 0.01, "jitter": 0.1},
    "deepseek": {
        "score": "sigmoid",
        "scale": 2.5,
        "groups": 4,
        "groups_kept": 2,
        "selection_bias": True,
        "bias_rate": 0.05,
        "aux_loss": 0.1,
        "aux_level": "sequence",
    },
    "global": {"aux_loss": 0.1, "aux_level": "global_batch", "logit_bias": True},
    "null": {"null_experts": 4, "aux_loss": 0.1},
    "expert_choice": {"name": "expert_choice"},
    "sinkhorn": {"name": "sinkhorn"},
}
CAPACITIES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "probability": {"capacity_factor": 0.8, "drop": "probability"},
    "position": {"capacity_factor": 0.8, "drop": "position"},
}
# tp, pp, dp, ep, etp
LAYOUTS = [
    (1, 1, 2, 2, 1),
    (2, 1, 1, 2, 1),
    (2, 1, 1, 1, 1),
    (2, 1, 1, 1, 2),
    (2, 1, 2, 4, 1),  # ep above dp
    (2, 1, 2, 2, 2),
    (4, 1, 1, 2, 2),
    (1, 1, 4, 2, 1),
    (2, 2, 1, 2, 1),
    (1, 2, 4, 4, 1),
    (2, 2, 2, 4, 1),
    (2, 2, 2, 2, 2),
    (1, 4, 2, 2, 1),
]
FACTORS: dict[str, list[Any]] = {
    "layout": LAYOUTS,
    "router": list(ROUTERS),
    "capacity": list(CAPACITIES),
    "dispatcher": ["all_to_all", "all_gather"],
    "weigh": ["before", "after"],
    "shared": [0, 16],
    "bias": [False, True],
    "dense_layers": [0, 2],
    "pipeline": ["1f1b", "zb-h1", "gis", "gis-balanced", "v-half-balanced"],
    "dtype": ["fp64", "fp64", "fp32"],
    "sharding": ["ddp", "zero1"],
    "recompute": ["none", "full"],
    "documents": [False, True],
}


def _allowed(case: Case) -> bool:
    if case["router"] == "sinkhorn" and case["capacity"] != "dropless":
        return False
    return case["layout"][1] > 1 or case["pipeline"] == "1f1b"


CASES = pairwise(FACTORS, _allowed, seed=5)


def moe(**settings: Any) -> MoeConfig:
    """Eight experts of width 24, two per token."""
    router = RouterConfig(**{"groups_kept": 1, **settings.pop("router", {})})
    return MoeConfig(**{"experts": 8, "top_k": 2, "ffn": 24, **settings}, router=router)


def settings(case: Case) -> dict[str, Any]:
    """A case as arguments of `check`."""
    tp, pp, dp, ep, etp = case["layout"]
    schedule = case["pipeline"].removesuffix("-balanced")
    vocab = "ends" if schedule == case["pipeline"] else "balanced"
    fp64 = case["dtype"] == "fp64"
    experts = moe(
        router=ROUTERS[case["router"]],
        **CAPACITIES[case["capacity"]],
        dispatcher=case["dispatcher"],
        weigh=case["weigh"],
        shared=case["shared"],
        shared_gate=case["shared"] > 0,
        bias=case["bias"],
        dense_layers=case["dense_layers"],
    )
    return {
        "tp": tp, "pp": pp, "dp": dp, "ep": ep, "etp": etp,
        "pipeline": {"schedule": schedule, "chunks": 1 if schedule in ("1f1b", "zb-h1") else 2, "vocab": vocab},
        "model": {"layers": 4, "moe": experts},
        "sharding": case["sharding"],
        "recompute": case["recompute"],
        "dtype": case["dtype"],
        "optim": "adamw" if fp64 else "sgd",
        "steps": STEPS,
        "micro_batch": 2,
        "global_batch": 8,
        "masked": case["documents"],
    }  # fmt: skip


def _name(case: Case) -> str:
    layout = "x".join(str(n) for n in case["layout"])
    words = [
        layout,
        *(str(case[key]) for key in FACTORS if key not in ("layout", "shared", "bias", "dense_layers", "documents")),
    ]
    return "-".join([*words, *(word for word in ("shared", "bias", "dense_layers", "documents") if case[word])])


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=_name(c), marks=[] if i % 14 == 0 else pytest.mark.slow) for i, c in enumerate(CASES)],
)
def test_layout(case):
    check(alone_model={"moe": _alone(settings(case)["model"]["moe"])}, **settings(case))


def _alone(experts: MoeConfig) -> MoeConfig:
    """What the twin has: the loop, tokens by all-to-all."""
    return replace(experts, compute="loop", dispatcher="all_to_all")
