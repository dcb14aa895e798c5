"""A model whose parameters are spread starts spread: nothing of it is ever whole on a rank."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from pentad.trainer.memory.fixed import held
from pentad.trainer.pipeline.programs import Pipeline
from pentad.trainer.setup import make_model, unmet_mesh_of
from tests.distributed import run_distributed
from tests.training import job


def _resident(which: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def _started(rank: int, world: int, cfg: Any) -> tuple[int, int]:
    """By how much a rank's memory grows at most while its part of the model is made and gets its first values, and what
    it keeps of parameters and masters."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _resident("VmRSS")
    parts = make_model(cfg, unmet_mesh_of(cfg, rank), torch.device("cpu"))
    return _resident("VmHWM") - before, sum(each.nbytes for each in parts.replicas.keep().values())


def _job(sharding: str) -> Any:
    model = {"hidden": 512, "ffn": 2048, "heads": 8, "kv_heads": 8, "layers": 16}
    return job(dp=8, sharding=sharding, dtype="fp32", bucket_mib=32, global_batch=8, micro_batch=1, model=model)


def test_a_spread_model_starts_spread() -> None:
    ((whole, kept),) = run_distributed(_started, 1, _job("zero1"), group=False)
    assert whole >= kept > 200 * 2**20
    cfg = _job("fsdp")
    ((peak, shards),) = run_distributed(_started, 1, cfg, group=False)
    mine = held(cfg, Pipeline.of(cfg), 0)
    assert shards == mine.parameters < kept / 7
    # Values are drawn parameter by parameter, in fp32, with a copy of each.
    assert peak < shards + mine.gathered + 16 * 2**20
