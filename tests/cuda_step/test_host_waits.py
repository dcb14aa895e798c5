"""Where the host of a training step waits for its GPU: nowhere in a dense step, hardly anywhere with experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.cuda_step.jobs import make_batch, make_job, uneven_ends
from tests.cuda_step.step import trace_step


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("preset", ["llama3.2_1b", "qwen3_0.6b", "gpt2", "mistral_7b"])
def test_the_host_of_a_dense_step_never_waits(tmp_path: Path, preset: str, documents: bool) -> None:
    more = ["model.max_positions=2048"] if preset == "gpt2" else []
    trace = trace_step(make_job(tmp_path, preset, *more), partial(make_batch, documents=documents))
    assert not trace.waits
    assert len(trace.kernels) > 100


# With few large experts each gets a product of its own for its weights' gradient, in backward, of as many rows as its
# forward pass has sent on their way to the host.
@pytest.mark.parametrize(
    ("preset", "waits"),
    [("qwen3_30b_a3b", {}), ("mixtral_8x7b", {"tolist @ parallel.kernels.upload:Download.tolist": 4})],
)
def test_experts_on_one_device_need_no_numbers_of_rows(tmp_path: Path, preset: str, waits: dict[str, int]) -> None:
    cfg = make_job(tmp_path, preset)
    assert trace_step(cfg, make_batch, uneven_ends(cfg)).waits == waits
