"""Products in 8 bits learn real text as well as those in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pentad.configs.schema import AdamWConfig, CosineSchedule, MoeConfig
from tests.trainer.checkpoint.test_resume import train
from tests.training import job

MODEL = {"hidden": 64, "layers": 2, "ffn": 176, "heads": 4, "kv_heads": 4, "head_dim": 16, "vocab": 320}
EXPERTS = {"moe": MoeConfig(experts=4, top_k=2, ffn=96)}


def last_loss(folder: Path, fp8: str, steps: int, model: dict[str, object]) -> float:
    """The mean loss of the last sixth of a run on the demo's text, the source of Python's library."""
    cfg = job(
        model={**MODEL, **model, "max_positions": 64},
        steps=steps,
        seq_len=64,
        global_batch=8,
        micro_batch=8,
        dtype="bf16",
        fp8=fp8,
        optim=AdamWConfig(lr=1e-3, schedule=CosineSchedule(warmup_steps=steps // 10)),
    )
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, final=False))
    rows, _ = train(0, 1, cfg, folder / fp8, steps)
    assert len(rows) == steps
    return sum(row[1] for row in rows[-steps // 6 :]) / len(rows[-steps // 6 :])


@pytest.mark.parametrize(
    ("steps", "fp8", "model"),
    [
        (30, "row", EXPERTS),
        *(pytest.param(300, fp8, {}, marks=pytest.mark.slow) for fp8 in ("tensor", "row", "block")),
        pytest.param(300, "row", EXPERTS, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_that_of_bf16(tmp_path: Path, steps: int, fp8: str, model: dict[str, object]) -> None:
    full, mine = (last_loss(tmp_path, kind, steps, model) for kind in ("none", fp8))
    print(f"\n{steps} steps, loss {full:.4f}, {fp8} {100 * (mine / full - 1):+.2f} %")
    assert mine != full and abs(mine / full - 1) <= 0.01
