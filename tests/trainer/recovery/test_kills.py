"""Ranks are killed at any point of a step, spares take their places, and the job ends with the bits of one that was not
disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.recovery.harness import Kill, Ran, StandIn, small_job

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-dp2-zero1": {"tp": 2, "dp": 2, "sharding": "zero1", "dtype": "bf16"},
}


def disturbed(folder: Path, layout: str, spares: int, *kills: Kill, **wanted: Any) -> Ran:
    cfg = small_job(folder, **LAYOUTS[layout], **wanted)
    return StandIn(cfg, folder / "logs", spares, kills).run()


def assert_same_training(ran: Ran, whole: Ran) -> None:
    """Every step once with the same numbers, and the same bits at the end."""
    assert not ran.errors, "\n".join(ran.errors.values())
    assert ran.curve == whole.curve
    assert ran.state.keys() == whole.state.keys()
    for name, value in whole.state.items():
        assert torch.equal(ran.state[name], value), name
    assert {key: ran.about[key] for key in ("step", "updates", "tokens", "skipped")} == {
        key: whole.about[key] for key in ("step", "updates", "tokens", "skipped")
    }


@pytest.mark.distributed
def test_a_killed_rank_is_replaced(tmp_path: Path) -> None:
    whole = disturbed(tmp_path / "whole", "tp2-dp2-zero1", 0)
    ran = disturbed(tmp_path / "killed", "tp2-dp2-zero1", 1, Kill(1, 3, 10))
    assert len(whole.metrics) == 6
    assert_same_training(ran, whole)
    assert len(ran.recoveries) == 1
