"""What masters and moments take where they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pentad.configs.fields import with_value
from pentad.configs.schema import AdamWConfig, Config, HardwareConfig
from pentad.trainer.memory.estimate import GIB, estimate
from pentad.trainer.optim.places import HostStatePlace, make_place
from tests.training import Run, job

MODEL = {"hidden": 256, "ffn": 512, "layers": 1, "heads": 4, "head_dim": 64, "vocab": 256}


def _job(**keys: str | int | float) -> Config:
    cfg = job(model=MODEL, dtype="bf16")
    for key, value in keys.items():
        cfg = with_value(cfg, key.replace("__", "."), value)
    return cfg


def test_auto_goes_to_the_host_only_where_the_job_does_not_fit() -> None:
    here, there = estimate(_job()), estimate(_job(memory__offload_optimizer="host"))
    assert there.held.host == here.held.masters + here.held.states and there.total < here.total
    auto, device = _job(memory__offload_optimizer="auto"), torch.device("cpu")
    for limit, on_host in ((None, False), (1.01 * here.total / GIB, False), (0.99 * here.total / GIB, True)):
        cfg = replace(auto, hardware=HardwareConfig(memory_gib=limit))
        assert isinstance(make_place(cfg, device), HostStatePlace) == on_host
        assert estimate(cfg).total == (there if on_host else here).total


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8", "int4"])
def test_states_take_the_bytes_that_the_model_says(states: str) -> None:
    cfg = _job()
    assert isinstance(cfg.optim, AdamWConfig)
    cfg = replace(cfg, optim=replace(cfg.optim, states=states, states_above=1000))  # type: ignore[arg-type]
    run = Run(0, cfg)
    held = sum(t.numel() * t.element_size() for each in run.optimizer.states.values() for t in each.values())
    run.close()
    # Rows and columns of a few small matrices are more of them than of large ones.
    assert estimate(cfg).held.states == pytest.approx(held, rel=0.06 if states == "int4" else 0.01)
