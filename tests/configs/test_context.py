"""Which method and placement of context parallelism a job gets where it does not say."""

from __future__ import annotations

from typing import Any

import pytest

from pentad.configs.resolve import resolve_context
from pentad.configs.schema_model import MlaConfig, ModelConfig
from pentad.configs.schema_parallel import ContextConfig, ParallelConfig

LATENT: dict[str, Any] = {"mla": MlaConfig(kv_rank=512)}
HYBRID: dict[str, Any] = {"attention_every": 4}


@pytest.mark.parametrize(
    ("cp", "tp", "heads", "kv_heads", "model", "method"),
    [
        (2, 1, 32, 8, {}, "ring"),
        (4, 1, 32, 32, {}, "ulysses"),
        (8, 1, 32, 8, {}, "ulysses"),  # 6 > 5
        (6, 1, 36, 9, {}, "ring"),  # 4.5 < 5
        (8, 1, 12, 12, {}, "ring"),  # heads that cannot be shared out
        (8, 8, 32, 32, {}, "ring"),  # four heads on a rank
        (16, 1, 128, 128, LATENT, "allgather"),
        (4, 1, 16, 4, HYBRID, "ulysses"),
        (8, 1, 12, 4, HYBRID, "allgather"),
    ],
)
def test_auto_sends_least(cp, tp, heads, kv_heads, model, method):
    config = ModelConfig(layers=4, hidden=64, heads=heads, kv_heads=kv_heads, ffn=128, **model)
    found = resolve_context(ParallelConfig(cp=cp, tp=tp), config)
    assert (found.method, found.placement) == (method, "contiguous" if model is HYBRID else "zigzag")


def test_documents_by_length_need_a_method_that_passes_ranks_by():
    config = ModelConfig(layers=4, hidden=64, heads=32, kv_heads=32, ffn=128, **LATENT)
    parallel = ParallelConfig(cp=8, context=ContextConfig(placement="by_length"))
    assert resolve_context(parallel, config).method == "ring"


@pytest.mark.parametrize(("cp", "heads", "kv_heads", "inner"), [(8, 32, 8, 8), (16, 32, 8, 8), (12, 8, 2, 2)])
def test_usp_exchanges_heads_among_as_many_ranks_as_can(cp, heads, kv_heads, inner):
    config = ModelConfig(layers=4, hidden=64, heads=heads, kv_heads=kv_heads, ffn=128)
    assert resolve_context(ParallelConfig(cp=cp, context=ContextConfig(method="usp")), config).inner == inner


def test_what_is_given_stays():
    config = ModelConfig(layers=4, hidden=64, heads=32, kv_heads=32, ffn=128)
    given = ContextConfig(method="usp", inner=2, placement="contiguous")
    assert resolve_context(ParallelConfig(cp=4, context=given), config) == given
