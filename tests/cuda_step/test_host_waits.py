"""Where the host of a training step waits for its GPU: nowhere in a dense step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.cuda_step.jobs import make_batch, make_job
from tests.cuda_step.step import trace_step


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("preset", ["llama3.2_1b", "qwen3_0.6b", "gpt2", "mistral_7b"])
def test_the_host_of_a_dense_step_never_waits(tmp_path: Path, preset: str, documents: bool) -> None:
    more = ["model.max_positions=2048"] if preset == "gpt2" else []
    trace = trace_step(make_job(tmp_path, preset, *more), partial(make_batch, documents=documents))
    assert not trace.waits
    assert len(trace.kernels) > 100
