"""What runs again in backward makes the bits of its first run, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.configs.schema import MlaConfig, MoeConfig
from pentad.trainer.numerics.non_finite import local_part
from tests.distributed import run_distributed
from tests.training import Run, job

MOE = MoeConfig(experts=4, top_k=2, ffn=32)
CAPACITY = MoeConfig(experts=4, top_k=2, ffn=32, capacity_factor=1.0)
LATENT = MlaConfig(kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8)
LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {"recompute": "full", "dtype": "bf16"},
    "tp pp selective": {"tp": 2, "pp": 2, "recompute": "selective", "dtype": "bf16"},
    "tp dp full": {"tp": 2, "dp": 2, "recompute": "full", "sharding": "zero1", "dtype": "fp32"},
    "ep full": {"dp": 2, "ep": 2, "recompute": "full", "model": {"moe": MOE}, "dtype": "bf16"},
    "ep selective": {"dp": 2, "ep": 2, "recompute": "selective", "model": {"moe": MOE}},
    "capacity": {"dp": 2, "ep": 2, "recompute": "full", "model": {"moe": CAPACITY}},
    "etp": {"tp": 2, "etp": 2, "recompute": "full", "model": {"moe": MOE}},
    "cp ring": {"cp": 2, "recompute": "full", "context": {"method": "ring"}},
    "cp ulysses": {"cp": 2, "recompute": "selective", "context": {"method": "ulysses"}, "dtype": "bf16"},
    "split": {"pp": 2, "recompute": "selective", "pipeline": {"schedule": "zb-h1"}},
    "interleaved": {
        "pp": 2, "recompute": "full", "pipeline": {"schedule": "interleaved", "chunks": 2}, "model": {"layers": 4}
    },
    "fsdp": {"dp": 2, "recompute": "full", "sharding": "fsdp2"},
    "dropout": {"recompute": "full", "model": {"dropout": 0.2}},
    "some tokens": {"recompute": "selective", "memory": {"token_share": 0.5}},
    "offload": {"recompute": "full", "offload": "all"},
    "latent": {"tp": 2, "recompute": "full", "model": {"mla": LATENT}},
    "predictions": {"recompute": "full", "model": {"mtp": 1}},
}  # fmt: skip


def _trained(
    rank: int, world: int, wanted: dict[str, Any], guarded: bool
) -> tuple[float, list[float], list[Tensor], int]:
    """What was found, losses, parameters, and how many tensors were compared in the last step."""
    run = Run(rank, job(**wanted, steps=2, numerics={"recompute": guarded}))
    try:
        results = [run.issue(step) for step in range(2)]
        run.parts.replicas.wait_gathers()
        found = float(results[-1].corrupted)
        params = [local_part(p.detach()) for p in run.parts.model.parameters()]
        prints = run.stepper.guard.prints if run.stepper.guard is not None else None
        compared = 0 if prints is None else len(prints._compared)
        return found, [float(r.loss) for r in results], [p.clone() for p in params], compared
    finally:
        run.close()


@pytest.mark.distributed
@pytest.mark.sample(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_make_the_same_bits_and_training_has_those_without_the_guard(layout: str) -> None:
    wanted = LAYOUTS[layout]
    world = job(**wanted).parallel.ranks
    guarded, plain = (run_distributed(_trained, world, wanted, on, group=False) for on in (True, False))
    for (found, losses, params, compared), (_, expected, theirs, none) in zip(guarded, plain, strict=True):
        assert found == 0 and losses == expected and none == 0
        assert (compared > 0) == (layout != "some tokens")
        assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))
