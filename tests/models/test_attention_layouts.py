"""Every kind of attention trains equally in every layout (DESIGN invariant 1)."""

from __future__ import annotations

from typing import Any

import pytest

from pentad.configs.schema import MlaConfig, RopeConfig
from tests.distributed import run_distributed
from tests.same_training import check, reference, worst
from tests.training import curve, job

MLA = {"mla": MlaConfig(kv_rank=12, q_rank=20, nope_dim=8, rope_dim=4, value_dim=6), "head_dim": 12}
DIRECT = {"mla": MlaConfig(kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6), "head_dim": 12}
MODELS: dict[str, dict[str, Any]] = {
    "mla": {**MLA, "rope": RopeConfig(interleaved=True, score_factor=1.3)},
    "mla-bias": {**MLA, "qkv_bias": True, "out_bias": True, "family": "deepseek_v3"},
    "mla-direct": {**DIRECT, "family": "deepseek_v2"},
    "norm-of-all-heads": {"qk_norm": True, "qk_norm_whole": True},
    "sinks": {"sinks": True, "window": 4, "window_every": 2, "activation": "swiglu_clipped", "qkv_bias": True,
              "out_bias": True, "family": "gpt_oss"},
}  # fmt: skip
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("mla", {"tp": 2}),
    ("mla", {"tp": 2, "dp": 2, "sharding": "zero1", "masked": True}),
    ("mla-bias", {"tp": 4, "sharding": "zero1"}),
    ("mla-bias", {"tp": 2, "pp": 2, "pipeline": {"schedule": "zb-h1"}, "recompute": "full"}),
    ("mla-direct", {"tp": 2, "pp": 2, "pipeline": {"schedule": "zb-v", "chunks": 2}}),
    ("norm-of-all-heads", {"tp": 2}),
    ("norm-of-all-heads", {"tp": 2, "dp": 2, "recompute": "full"}),
    ("sinks", {"tp": 2, "masked": True}),
    ("sinks", {"tp": 2, "pp": 2, "sharding": "zero1", "pipeline": {"schedule": "zb-h1"}}),
]


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_layout(name, layout):
    check(model={**MODELS[name], "layers": 4 if "pp" in layout else 2}, steps=5, **layout)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["mla", "norm-of-all-heads", "sinks"])
def test_fsdp(name):
    cfg = job(model=MODELS[name], tp=2, dp=2, steps=5, sharding="fsdp2")
    curves = run_distributed(curve, 4, cfg, False, group=False)
    assert worst(curves, reference(job(model=MODELS[name], steps=5), False).curve) < 1e-11


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["norm-of-all-heads", "sinks"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_key_heads_than_ranks(name, kv_heads):
    """Four ranks, each key head on several of them: a norm over all key heads counts each of them once."""
    check(model={**MODELS[name], "kv_heads": kv_heads}, tp=4, steps=5, sharding="zero1")
