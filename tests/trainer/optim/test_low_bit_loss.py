"""Coded moments learn real text as well as those in full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pentad.configs.schema import AdamWConfig, ConstantSchedule, CosineSchedule
from tests.trainer.checkpoint.test_resume import train
from tests.training import job

MODEL = {"hidden": 64, "layers": 2, "ffn": 176, "heads": 4, "kv_heads": 4, "head_dim": 16, "vocab": 320}
"""Its tables and feed-forward networks have more elements than `optim.states_above`, its attention has not."""


def last_losses(folder: Path, states: str, steps: int) -> float:
    """The mean loss of the last sixth of a run on the demo's text, the source of Python's library."""
    schedule: ConstantSchedule = CosineSchedule(warmup_steps=steps // 10)
    optim = AdamWConfig(lr=1e-3, schedule=schedule, states=states)  # type: ignore[arg-type]
    cfg = job(
        model={**MODEL, "max_positions": 64},
        steps=steps,
        seq_len=64,
        global_batch=8,
        micro_batch=8,
        dtype="fp32",
        optim=optim,
    )
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, final=False))
    rows, _ = train(0, 1, cfg, folder / states, steps)
    assert len(rows) == steps
    return sum(row[1] for row in rows[-steps // 6 :]) / len(rows[-steps // 6 :])


@pytest.mark.parametrize(
    ("steps", "kinds", "limit"),
    [(40, ("int4",), 0.03), pytest.param(300, ("int4", "int8", "bf16"), 0.005, marks=pytest.mark.slow)],
)
def test_the_loss_is_that_of_full_moments(tmp_path: Path, steps: int, kinds: tuple[str, ...], limit: float) -> None:
    full = last_losses(tmp_path, "fp32", steps)
    found = {states: last_losses(tmp_path, states, steps) / full - 1 for states in kinds}
    print(
        f"\n{steps} steps, loss {full:.4f}: " + ", ".join(f"{states} {100 * d:+.2f} %" for states, d in found.items())
    )
    assert all(abs(difference) <= limit for difference in found.values()), found
