"""The rough time of a step: gathers of spread parameters cost what the passes beside them do not hide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pentad.configs.schema import Config
from pentad.trainer.memory.step_time import step_time
from tests.training import job

_MODEL = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "layers": 8, "vocab": 32000}


_WANTED: dict[str, Any] = {"dp": 8, "micro_batch": 1, "global_batch": 32, "dtype": "bf16", "grads": 8, "states": 8}


def _job(seq_len: int, params: int) -> Config:
    cfg = job(**_WANTED, seq_len=seq_len, params=params, model=_MODEL)
    return replace(cfg, hardware=replace(cfg.hardware, peak_tflops=989.0))


def test_gathers_hide_behind_long_passes_and_not_behind_short_ones() -> None:
    def longer(seq_len: int) -> float:
        return step_time(_job(seq_len, params=8)).seconds / step_time(_job(seq_len, params=1)).seconds

    assert longer(8192) < 1.02
    assert longer(128) > 1.1
