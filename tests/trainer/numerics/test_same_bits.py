"""Guards read: with them the training has the same bits as without, in every layout, and they find nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pentad.configs.schema import AdamWConfig, Config, ConstantSchedule, MoeConfig, NumericsConfig, RouterConfig
from tests.distributed import run_distributed
from tests.trainer.test_session import bits, numbers, run_step, same
from tests.training import job, open_session, world_of

ROUTED: dict[str, Any] = {
    "moe": MoeConfig(experts=4, top_k=2, ffn=24, router=RouterConfig(selection_bias=True, aux_loss=0.01))
}
CODED = AdamWConfig(lr=3e-3, schedule=ConstantSchedule(), states="int4", states_above=500)
HALF = AdamWConfig(lr=3e-3, schedule=ConstantSchedule(), states="bf16")
ON_HOST = {"offload_optimizer": "host", "optimizer_subgroup_mib": 0.01, "optimizer_stride": 2}
ON_DISK = {"offload_optimizer": "disk", "optimizer_subgroup_mib": 0.01, "offload_disk": "/tmp"}
BOTH = NumericsConfig(replicas_every=2, checksums=True)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank, odd sizes": {"global_batch": 6, "dtype": "bf16", "model": {"hidden": 27, "head_dim": 6, "ffn": 37}},
    "tp 2, dp 2, zero1": {"tp": 2, "dp": 2, "sharding": "zero1", "dtype": "bf16"},
    "tp 4, shared heads": {"tp": 4, "model": {"kv_heads": 2}, "dtype": "fp32"},
    "pp 2, dp 2, tied": {"pp": 2, "dp": 2, "model": {"tied": True}},
    "pp 2, split backward": {"pp": 2, "dp": 2, "sharding": "zero1", "pipeline": {"schedule": "zb-h1"}},
    "pp 2, balanced vocabulary": {"pp": 2, "pipeline": {"schedule": "gis", "vocab": "balanced"}},
    "cp 2, dp 2, zero1": {"cp": 2, "dp": 2, "sharding": "zero1"},
    "dp 2, ep 2, experts": {"dp": 2, "ep": 2, "model": ROUTED},
    "dp 4, ep 2, experts": {"dp": 4, "ep": 2, "model": ROUTED, "sharding": "zero1"},
    "dp 2, etp 2, experts": {"dp": 2, "etp": 2, "model": ROUTED, "sharding": "zero1"},
    "tp 2, dp 2, coded moments": {"tp": 2, "dp": 2, "sharding": "zero1", "dtype": "bf16", "optim": CODED},
    "dp 2, moments in bf16": {"dp": 2, "sharding": "zero1", "dtype": "bf16", "optim": HALF},
    "dp 2, states on the host": {"dp": 2, "sharding": "zero1", "dtype": "bf16", "memory": ON_HOST},
    "dp 2, states on a disk": {"dp": 2, "sharding": "zero1", "dtype": "bf16", "memory": ON_DISK},
    "tp 2, recompute": {"tp": 2, "recompute": "full", "optim": "sgd"},
    "tp 2, dp 2, fsdp": {"tp": 2, "dp": 2, "sharding": "fsdp2"},
}


def _trained(rank: int, world: int, cfg: Config) -> tuple[list[Any], dict[str, Any]]:
    """(loss, norm, skipped, found) of every step, and everything that a rank then has."""
    session = open_session(rank, cfg)
    try:
        results = [run_step(session, step) for step in range(cfg.train.steps)]
        return [(*numbers(result), float(result.corrupted)) for result in results], bits(session)
    finally:
        session.close()


@pytest.mark.distributed
@pytest.mark.sample(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_guards_change_nothing_and_find_nothing(layout: str) -> None:
    cfg = job(**LAYOUTS[layout], steps=4)
    wanted = replace(BOTH, checksums=cfg.parallel.data.sharding != "fsdp2")
    guarded = replace(cfg, faults=replace(cfg.faults, numerics=wanted))
    plain, watched = (run_distributed(_trained, world_of(cfg), each, group=False) for each in (cfg, guarded))
    for (curve, state), (guarded_curve, guarded_state) in zip(plain, watched, strict=True):
        assert curve == guarded_curve
        assert all(found == 0 for *_, found in guarded_curve)
        assert same(state, guarded_state)
