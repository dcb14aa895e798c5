"""Training that makes parts of layers again gives the bits of training that keeps everything, in every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pentad.configs.schema_model import LinearAttentionConfig, MlaConfig, MoeConfig, RouterConfig
from pentad.configs.schema_parallel import MemoryConfig
from tests.distributed import run_distributed
from tests.trainer.layouts.test_offload_training import LAYOUTS, SIZE
from tests.training import curve, job

DENSE = ("norm", "activation", "attention", "ffn")
EXPERTS = MoeConfig(experts=8, top_k=2, ffn=32, shared=16, router=RouterConfig(aux_loss=0.05))
LATENT = {"mla": MlaConfig(kv_rank=16, q_rank=12, nope_dim=8, rope_dim=4, value_dim=8), "head_dim": 12}
MORE: dict[str, dict[str, Any]] = {
    "po-h": {"pp": 2, "dp": 2, "model": {"layers": 8}, "pipeline": {"schedule": "po-h", "chunks": 4}},
    "po-f": {"pp": 4, "model": {"layers": 8}, "pipeline": {"schedule": "po-f", "chunks": 2}},
    "gis-4": {"pp": 4, "model": {"layers": 8}, "pipeline": {"schedule": "gis", "chunks": 2}},
    "cp": {"cp": 2, "context": {"method": "ring"}, "model": {"qk_norm": True}},
    "latent-tp-cp": {"tp": 2, "cp": 2, "model": LATENT},
    "latent-experts": {"tp": 2, "dp": 2, "ep": 4, "model": {**LATENT, "moe": EXPERTS}},
    "latent-zb-v": {"pp": 2, "tp": 2, "model": {**LATENT, "layers": 4}, "pipeline": {"schedule": "zb-v", "chunks": 2}},
    "linear-cp": {
        "cp": 2,
        "context": {"placement": "contiguous"},
        "model": {"attention_every": 2, "linear": LinearAttentionConfig(key_dim=8, value_dim=8, gate_rank=4, chunk=8)},
    },
    "chunks": {"dp": 2, "ep": 2, "model": {"moe": replace(EXPERTS, overlap_chunks=2, weigh="before")}},
    "fsdp": {"dp": 2, "sharding": "fsdp2"},
    "dropout-mtp": {"dp": 2, "tp": 2, "model": {"dropout": 0.1, "mtp": 1}},
}
EVERY = {**LAYOUTS, **MORE}
ALWAYS = {"latent-experts", "po-h", "fsdp"}
"""Run by `make test` too."""


def choices(layout: dict[str, Any]) -> list[MemoryConfig]:
    """What may be made again in a model, and what of the rest may be on the host."""
    model = layout.get("model", {})
    parts = (*DENSE, *["moe"] * ("moe" in model), *["latent"] * ("mla" in model))
    every = MemoryConfig(recompute="selective", recompute_parts=parts)
    latent = MemoryConfig(recompute="selective", recompute_parts=(*({"latent", "moe"} & {*parts}), "norm"))
    found = [
        MemoryConfig(recompute="full"),
        MemoryConfig(recompute="full", recompute_every=2),
        MemoryConfig(recompute="selective", recompute_layers=1),
        latent,
        every,
    ]
    if layout.get("sharding") != "fsdp2":
        found += [replace(each, offload_activations="all") for each in (found[0], every)]
    return found


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in EVERY]
)
def test_curves_are_bit_equal(name: str) -> None:
    cfg = job(**SIZE, **EVERY[name])
    expected = run_distributed(curve, cfg.parallel.ranks, cfg, group=False)
    wanted = choices(EVERY[name])
    for memory in wanted if name not in ALWAYS else wanted[-2:]:
        found = run_distributed(curve, cfg.parallel.ranks, replace(cfg, memory=memory), group=False)
        assert found == expected, memory
    first, *_, last = expected[0]
    assert last[0] < first[0] and last[2] == 0.0
