"""Training that keeps what parts of layers make of some tokens and makes the others again (memory.token_share), against
the same layout without: 1e-12 relative, for the second run's products have other shapes and round differently."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pentad.configs.schema import Config
from pentad.configs.schema_parallel import MemoryConfig
from pentad.models.costs.kept import SomeTokens
from pentad.trainer.pipeline.programs import Pipeline
from tests.distributed import run_distributed
from tests.same_training import worst
from tests.trainer.checkpoint.test_resume import straight, text_job, train
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
    if layout.get("sharding") != "fsdp2":
        found += [replace(memory, offload_activations=share) for share in (0.5, "all")]
    return found


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in LAYOUTS]
)
def test_curves_are_those_of_the_same_layout(name: str) -> None:
    cfg = job(**{**SIZE, **LAYOUTS[name]})
    expected = run_distributed(curve, cfg.parallel.ranks, cfg, group=False)
    wanted = choices(LAYOUTS[name])
    for memory in wanted[-1:] if name in ALWAYS else wanted:
        this = replace(cfg, memory=memory)
        assert any(isinstance(choice, SomeTokens) for choice in Pipeline.of(this).remade.values())
        found = run_distributed(curve, cfg.parallel.ranks, this, group=False)
        for mine, theirs in zip(found, expected, strict=True):
            assert worst([mine], theirs) < TOLERANCE, memory
    first, *_, last = expected[0]
    assert last[0] < first[0] and last[2] == 0.0


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"group": 1}, pytest.param({"pp": 2, "tp": 2}, marks=pytest.mark.slow)])
def test_a_run_goes_on(tmp_path: Path, layout: dict[str, Any]) -> None:
    """The bits of a run that was not stopped; and, under another share, its numbers."""
    memory = {"recompute_parts": DENSE, "token_share": 0.4}
    given = {**layout, "seq_len": 32, "model": {"layers": 2}}
    cfg = text_job(tmp_path, **given, recompute="selective", offload="all", memory=memory, deterministic=True)
    world, expected = cfg.parallel.ranks, straight(tmp_path, cfg.parallel.ranks, cfg)
    other = replace(cfg, memory=replace(cfg.memory, token_share=0.7, offload_activations="none"))

    def parts(second: Config) -> list[Any]:
        folder = tmp_path / f"parts-{second.memory.token_share}"
        first = run_distributed(train, world, cfg, folder, 10, group=False)[0][0]
        return first + run_distributed(train, world, second, folder, 20, group=False)[0][0]

    assert parts(cfg) == expected
    assert parts(other) == [pytest.approx(row, rel=TOLERANCE) for row in expected]
