"""Stages in parts (memory.group) give the bits of whole stages, with and without activations on the host, in every
layout (DESIGN invariant 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pentad.configs.schema import HardwareConfig, MoeConfig, RouterConfig
from tests.distributed import run_distributed
from tests.training import curve, job

# More elements than `saved.SMALL` in what layers save.
SIZE: dict[str, Any] = {"steps": 3, "seq_len": 64, "global_batch": 8}
EXPERTS = MoeConfig(experts=8, top_k=2, ffn=32, router=RouterConfig(selection_bias=True, bias_rate=0.01))
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {"model": {"layers": 4}},
    "alone-tied-ahead-dropout": {"model": {"layers": 3, "tied": True, "mtp": 1, "dropout": 0.1}},
    "learned-positions": {"model": {"layers": 3, "position": "learned", "max_positions": 64}, "recompute": "full"},
    "replicas": {"dp": 2, "sharding": "zero1", "model": {"layers": 3}},
    "tp": {"tp": 2, "model": {"layers": 3}, "recompute": "full"},
    "cp": {"cp": 2, "model": {"layers": 3}},
    "experts": {"dp": 2, "ep": 2, "model": {"moe": EXPERTS, "layers": 3}},
    "1f1b-balanced": {
        "pp": 2,
        "model": {"layers": 6},
        "pipeline": {"schedule": "1f1b", "vocab": "balanced"},
        "recompute": "selective",
    },
    "tied-ends": {"pp": 2, "model": {"layers": 5, "tied": True, "mtp": 1}, "pipeline": {"schedule": "zb-h1"}},
    "gis": {"pp": 4, "model": {"layers": 11}, "pipeline": {"schedule": "gis", "chunks": 2}},
    "gis-experts": {
        "pp": 2,
        "dp": 2,
        "ep": 2,
        "model": {"moe": EXPERTS, "layers": 6},
        "pipeline": {"schedule": "gis", "chunks": 2},
    },
    "v-half": {"pp": 2, "cp": 2, "model": {"layers": 7}, "pipeline": {"schedule": "v-half", "chunks": 2}},
    "po-h": {"pp": 2, "tp": 2, "model": {"layers": 7}, "pipeline": {"schedule": "po-h", "chunks": 2}},
    "po-f": {"pp": 4, "model": {"layers": 8}, "pipeline": {"schedule": "po-f", "chunks": 1}, "recompute": "full"},
    "empty": {"pp": 2, "model": {"layers": 3}, "pipeline": {"schedule": "gis", "chunks": 2, "layers": (0, 3, 0, 0)}},
}
ALWAYS = {"alone-tied-ahead-dropout", "1f1b-balanced"}
"""Run by `make test` too, a part of them."""


@pytest.mark.distributed
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in LAYOUTS])
def test_part_stages_train_like_whole_ones(name: str) -> None:
    # Copies that take no time beside the passes, however busy the machine is: auto finds some that are worthwhile.
    cfg = replace(job(**{**SIZE, **LAYOUTS[name]}), hardware=HardwareConfig(peak_tflops=0.001, host_gib_s=10.0))
    found = {}
    choices = ((None, "none"), (1, "none"), (1, "auto"), (1, "all"), (2, 0.5), (2, "auto"))
    for group, share in choices[:3] if name in ALWAYS else choices:
        this = replace(cfg, memory=replace(cfg.memory, group=group, offload_activations=share))
        found[group, share] = run_distributed(curve, this.parallel.ranks, this, group=False)
    whole = found[None, "none"]
    assert all(each == whole for each in found.values())
    first, *_, last = whole[0]
    assert last[0] < first[0] and last[2] == 0.0
