"""Training that keeps what parts of layers make of some tokens and makes the others again (memory.token_share), against
the same layout without: 1e-12 relative, for the second run's products have other shapes and round differently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pentad.configs.schema_parallel import MemoryConfig
from tests.distributed import run_distributed
from tests.same_training import worst
from tests.trainer.layouts.test_recompute_training import DENSE, EVERY, SIZE
from tests.training import curve, job

TOLERANCE = 1e-12
LAYOUTS: dict[str, dict[str, Any]] = {
    **EVERY,
    # Ranks have one and a half sequences: blocks are half a sequence.
    "tp-odd": {"tp": 2, "model": {"qk_norm": True, "qk_norm_whole": True}, "micro_batch": 3, "global_batch": 12},
    "tp-long": {"tp": 4, "micro_batch": 1, "model": {"kv_heads": 2}},
    "gis": {"pp": 2, "model": {"layers": 4}, "pipeline": {"schedule": "gis", "chunks": 2}},
    "parts": {"pp": 2, "model": {"layers": 5}, "group": 1},
}
ALWAYS = {"tp-odd", "parts"}
"""Run by `make test` too, with everything on the host."""


def choices(layout: dict[str, Any]) -> list[MemoryConfig]:
    model = layout.get("model", {})
    parts = (*DENSE, *["moe"] * ("moe" in model), *["latent"] * ("mla" in model))
    memory = MemoryConfig(recompute="selective", recompute_parts=parts, token_share=0.3, group=layout.get("group"))
    found = [memory, replace(memory, recompute_parts=("norm", "ffn"), token_share=0.7, recompute_layers=1)]
    if layout.get("sharding") != "fsdp":
        found += [replace(memory, offload_activations=share) for share in (0.5, "all")]
    return found


@pytest.mark.sample(4)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in LAYOUTS]
)
def test_curves_are_those_of_the_same_layout(name: str) -> None:
    cfg = job(**{**SIZE, **LAYOUTS[name]})
    expected = run_distributed(curve, cfg.parallel.ranks, cfg, group=False)
    wanted = choices(LAYOUTS[name])
    for memory in wanted[-1:] if name in ALWAYS else wanted:
        found = run_distributed(curve, cfg.parallel.ranks, replace(cfg, memory=memory), group=False)
        for mine, theirs in zip(found, expected, strict=True):
            assert worst([mine], theirs) < TOLERANCE, memory
    first, *_, last = expected[0]
    assert last[0] < first[0] and last[2] == 0.0
