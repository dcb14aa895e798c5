"""Where the host of a training step waits for its GPU: nowhere in a dense step, hardly anywhere with experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from pentad.models.costs.flops import fp8_flops
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


@pytest.mark.parametrize("fp8", ["tensor", "row", "block"])
def test_products_in_eight_bits_cost_no_wait_and_are_the_flops_that_are_counted(tmp_path: Path, fp8: str) -> None:
    cfg = make_job(tmp_path, "llama3.2_1b", f"train.fp8={fp8}")
    trace = trace_step(cfg, make_batch)
    assert not trace.waits
    done = sum(kernel.flops for kernel in trace.kernels if kernel.name == "_scaled_mm")
    assert done == fp8_flops(cfg.model, cfg.train.global_batch * cfg.train.seq_len, fp8)


def test_experts_in_eight_bits_are_grouped_products(tmp_path: Path) -> None:
    cfg = make_job(tmp_path, "qwen3_30b_a3b", "train.fp8=tensor")
    trace = trace_step(cfg, make_batch, uneven_ends(cfg))
    assert not trace.waits
    done = sum(kernel.flops for kernel in trace.kernels if kernel.name in ("_scaled_mm", "_scaled_grouped_mm"))
    assert done == fp8_flops(cfg.model, cfg.train.global_batch * cfg.train.seq_len, "tensor")
