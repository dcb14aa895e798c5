"""Any layout, same training: curves of every layout against one process (DESIGN invariant 1)."""

from __future__ import annotations

import itertools
import random

import pytest

from pentad.configs.schema import MlaConfig
from tests.distributed import run_distributed
from tests.same_training import TOLERANCE, worst
from tests.training import curve, job

GRID = [
    (tp, dp, sharding, dtype)
    for tp, dp, sharding, dtype in itertools.product((1, 2, 4), (1, 2, 4), ("ddp", "zero1", "fsdp2"), ("fp64", "fp32"))
    if 1 < tp * dp <= 8
]
# Every run sees some layouts; `make test-all` sees them all.
SAMPLE = set(random.Random(2).sample(GRID, 12)) | {(2, 2, "zero1", "fp64"), (4, 2, "fsdp2", "fp32")}


_REFERENCES: dict = {}


def reference(cfg, masked: bool = False) -> list:
    """One process's curve; in which the loss must fall by at least 5 %, or equality would prove nothing."""
    key = repr((cfg.model, cfg.train, cfg.optim, masked))
    if key not in _REFERENCES:
        result = run_distributed(curve, 1, cfg, masked, group=False)[0]
        assert result[-1][0] < 0.95 * result[0][0]
        _REFERENCES[key] = result
    return _REFERENCES[key]


def check(*, masked: bool = False, **settings) -> None:
    cfg = job(**settings)
    alone = job(**{**settings, "tp": 1, "cp": 1, "dp": 1, "sharding": "ddp"})
    p = cfg.parallel
    curves = run_distributed(curve, p.ranks, cfg, masked, group=False)
    assert worst(curves, reference(alone, masked)) < TOLERANCE[cfg.train.dtype]


@pytest.mark.sample(4)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp", "dp", "sharding", "dtype"),
    [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.slow) for case in GRID],
)
def test_layout(tp, dp, sharding, dtype):
    check(tp=tp, dp=dp, sharding=sharding, dtype=dtype)


@pytest.mark.distributed
@pytest.mark.parametrize("latent", [False, True])
def test_fsdp_shards_over_the_context_ranks_too(latent):
    mla = MlaConfig(kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6) if latent else MlaConfig()
    check(cp=2, dp=2, sharding="fsdp2", masked=True, model={"mla": mla, "head_dim": 8})


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("sharding", ["zero1", "fsdp2"])
def test_key_value_heads_fewer_than_ranks(kv_heads, sharding):
    model = {"kv_heads": kv_heads, "qk_norm": True, "qkv_bias": True}
    check(tp=4, dp=2, sharding=sharding, model=model)


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "model",
    [
        {"tied": True},
        {"norm": "layer", "position": "learned", "activation": "gelu_tanh", "qkv_bias": True, "out_bias": True,
         "ffn_bias": True, "tied": True, "family": "gpt2"},
        {"dropout": 0.1},
        {"window": 5},
    ],
    ids=["tied", "gpt2", "dropout", "window"],
)  # fmt: skip
@pytest.mark.parametrize("sharding", ["zero1", "fsdp2"])
def test_model_options(model, sharding):
    check(tp=2, dp=2, sharding=sharding, model=model)


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "zero1", "fsdp2"])
def test_packed_documents_with_uneven_losses(sharding):
    check(tp=2, dp=2, sharding=sharding, masked=True)


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("micro_batch", "dp", "sharding"), [(1, 1, "ddp"), (8, 1, "ddp"), (1, 2, "fsdp2"), (4, 2, "zero1")]
)
def test_microbatch_and_accumulation_change_nothing(micro_batch, dp, sharding):
    cfg = job(micro_batch=micro_batch, dp=dp, sharding=sharding)
    curves = run_distributed(curve, dp, cfg, group=False)
    assert worst(curves, reference(job())) < 1e-11


@pytest.mark.distributed
def test_bucket_size_changes_nothing():
    for size in (0.001, 64.0):
        check(tp=1, dp=2, sharding="zero1", bucket_mib=size)


@pytest.mark.distributed
@pytest.mark.parametrize("pipeline", [{"schedule": "gis", "chunks": 2, "vocab": "balanced"}, {"layers": (1, 3)}])
def test_a_pipeline_section_without_a_pipeline_changes_nothing(pipeline):
    check(tp=1, dp=2, pipeline=pipeline)
