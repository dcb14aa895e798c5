"""Where the host of a training step waits for its GPU: nowhere in a dense step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pentad.configs import load
from pentad.configs.schema import Config
from pentad.trainer.data.dataset import Microbatch
from tests.cuda_step.step import trace_step

_LENGTH = 2048


def _job(folder: Path, preset: str, *overrides: str) -> Config:
    """Two layers of a preset, two microbatches a step."""
    config = folder / "job.yaml"
    config.write_text(
        f"name: traced\nmodel: {{preset: {preset}}}\ndata: {{name: stdlib}}\noptim: {{name: adamw, lr: 3e-4}}\n"
        f"train: {{steps: 2, global_batch: 2, micro_batch: 1, seq_len: {_LENGTH}, dtype: bf16}}\n"
    )
    return load(str(config), ["model.layers=2", *overrides], world_size=1)


def _batch(index: int, *, documents: bool = False) -> Microbatch:
    tokens = torch.zeros(1, _LENGTH, dtype=torch.long)
    positions = found = None
    if documents:
        starts = torch.rand((1, _LENGTH), generator=torch.Generator().manual_seed(index)) < 1 / 300
        found = torch.cumsum(starts, 1, dtype=torch.int32)
        positions = torch.arange(_LENGTH).expand(1, -1).contiguous()
    return Microbatch(tokens, tokens.clone(), positions, found, torch.arange(1), _LENGTH, _LENGTH**2 / 2)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("preset", ["llama3.2_1b", "qwen3_0.6b", "gpt2", "mistral_7b"])
def test_the_host_of_a_dense_step_never_waits(tmp_path: Path, preset: str, documents: bool) -> None:
    cfg = _job(tmp_path, preset, "model.max_positions=2048") if preset == "gpt2" else _job(tmp_path, preset)
    trace = trace_step(cfg, lambda index: _batch(index, documents=documents))
    assert not trace.waits
    assert len(trace.kernels) > 100
