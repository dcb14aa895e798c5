"""Sequences shared by context ranks train like whole ones in one process (DESIGN invariant 1)."""

from __future__ import annotations

from typing import Any

import pytest

from pentad.configs.schema import LinearAttentionConfig, MlaConfig, MoeConfig, RouterConfig
from tests.covering import Case, pairwise
from tests.same_training import check

EXPERTS = MoeConfig(
    experts=8,
    top_k=2,
    ffn=24,
    capacity_factor=1.5,
    router=RouterConfig(groups_kept=1, aux_loss=0.05, aux_level="sequence", z_loss=0.01, jitter=0.05),
)
FACTORS: dict[str, list[Any]] = {
    "method": ["allgather", "ulysses", "ring", "ring-duplex", "usp", "tokenring"],
    "heads": [(8, 8), (8, 2), (8, 1)],
    # cp, tp, pp, dp, ep
    "layout": [
        (2, 1, 1, 1, 1),
        (4, 1, 1, 1, 1),
        (8, 1, 1, 1, 1),
        (2, 2, 1, 1, 1),
        (2, 1, 2, 1, 1),
        (2, 1, 1, 2, 1),
        (4, 1, 2, 1, 4),
        (2, 2, 2, 1, 4),
        (2, 2, 1, 2, 4),
    ],
    "documents": [False, True],
    "placement": ["zigzag", "by_length", "contiguous"],
    "window": [None, 5],
    "recompute": ["none", "full"],
    "pipeline": ["1f1b", "gis-balanced", "zb-h1"],
    "sharding": ["ddp", "zero1"],
    "dtype": ["fp64", "fp64", "fp32"],
}


def _allowed(case: Case) -> bool:
    cp, tp, pp, _, _ = case["layout"]
    heads, kv_heads = (max(1, n // tp) for n in case["heads"])
    if case["method"] == "ulysses" and (heads % cp or (kv_heads % cp and cp % kv_heads)):
        return False
    if case["method"] == "usp" and cp == 2:
        return False
    if case["placement"] == "by_length" and case["method"] in ("allgather", "ulysses"):
        return False
    if case["method"] == "ring-duplex" and kv_heads % 2:
        return False
    return pp > 1 or case["pipeline"] == "1f1b"


CASES = pairwise(FACTORS, _allowed, seed=11)


def settings(case: Case) -> dict[str, Any]:
    """A case as arguments of `check`."""
    cp, tp, pp, dp, ep = case["layout"]
    heads, kv_heads = case["heads"]
    method, _, duplex = case["method"].partition("-")
    schedule, _, balanced = case["pipeline"].partition("-b")
    model = {"layers": 4, "heads": heads, "kv_heads": kv_heads, "head_dim": 4, "window": case["window"]}
    fp64 = case["dtype"] == "fp64"
    return {
        "cp": cp, "tp": tp, "pp": pp, "dp": dp, "ep": ep,
        "context": {
            "method": method, "duplex": bool(duplex), "placement": case["placement"],
            "inner": 2 if method == "usp" else None,
        },
        "pipeline": {
            "schedule": schedule, "chunks": 2 if schedule == "gis" else 1, "vocab": "balanced" if balanced else "ends",
        },
        "model": model | ({"moe": EXPERTS} if ep > 1 else {}),
        "sharding": case["sharding"],
        "recompute": case["recompute"],
        "dtype": case["dtype"],
        "optim": "adamw" if fp64 else "sgd",
        "steps": 5,
        "micro_batch": 2,
        "global_batch": 8,
        "masked": case["documents"],
    }  # fmt: skip


def _name(case: Case) -> str:
    layout = "x".join(str(n) for n in case["layout"])
    words = [
        case["method"],
        "x".join(str(n) for n in case["heads"]),
        layout,
        case["placement"],
        case["pipeline"],
        case["dtype"],
    ]
    words += [case["sharding"], case["recompute"]]
    return "-".join([*words, *(word for word in ("documents", "window") if case[word])])


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=_name(c), marks=[] if i % 10 == 0 else pytest.mark.slow) for i, c in enumerate(CASES)],
)
def test_layout(case):
    check(**settings(case))


MLA = MlaConfig(kv_rank=8, q_rank=12, nope_dim=4, rope_dim=4, value_dim=6)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["allgather", "ulysses", pytest.param("ring", marks=pytest.mark.slow)])
def test_latent_attention(method):
    model = {"mla": MLA, "head_dim": 8, "kv_heads": 4}
    check(cp=2, tp=2, context={"method": method}, model=model, masked=True, steps=5)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        {"cp": 4, "dtype": "fp32", "recompute": "full", "model": {"window": 6, "window_every": 2}},
        {"cp": 2, "tp": 2, "pp": 2, "pipeline": {"schedule": "gis", "chunks": 2, "vocab": "balanced"}},
        {"cp": 2, "dp": 2, "sharding": "zero1", "context": {"placement": "contiguous"}},
    ],
    ids=["recompute", "split", "contiguous"],
)
def test_gathered_latents(layout):
    """What every rank expands for itself: its weight's gradient has a part from each rank's tokens."""
    model = {"mla": MLA, "layers": 4, "head_dim": 8, "kv_heads": 4, **layout.get("model", {})}
    context = {"method": "allgather", **layout.get("context", {})}
    check(**{**layout, "model": model, "context": context}, masked=True, steps=5)


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["allgather", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_hybrid_stacks(method):
    """Linear attention hands its state on; every second layer is softmax attention.

    With SGD: the decays' gradients are a thousandth of the others', and Adam makes their rounding as large as those.
    """
    linear = LinearAttentionConfig(key_dim=4, value_dim=8, gate_rank=4, chunk=4)
    model = {"layers": 4, "attention_every": 2, "linear": linear}
    context = {"method": method, "placement": "contiguous"}
    check(cp=2, tp=2, pp=2, context=context, model=model, masked=True, recompute="full", steps=5, optim="sgd")


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("cp", "context"),
    [
        (2, {"method": "ring"}),
        (4, {"method": "ring", "duplex": True}),
        (2, {"method": "tokenring"}),
        pytest.param(4, {"method": "tokenring"}, marks=pytest.mark.slow),
        (4, {"method": "usp", "inner": 2}),
    ],
    ids=str,
)
def test_any_method_beside_linear_attention_is_only_slower(cp, context):
    linear = LinearAttentionConfig(key_dim=4, value_dim=8, gate_rank=4, chunk=4)
    model = {"layers": 2, "attention_every": 2, "linear": linear}
    check(cp=cp, context={**context, "placement": "contiguous"}, model=model, masked=True, steps=5, optim="sgd")


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
@pytest.mark.parametrize("cp", [2, 4])
def test_documents_by_length_with_a_method_that_gains_nothing(method, cp):
    check(cp=cp, context={"method": method, "placement": "by_length"}, masked=True, steps=5)


@pytest.mark.distributed
def test_sinks_dropout_and_learned_positions():
    model = {"sinks": True, "dropout": 0.1, "position": "learned", "window": 6, "window_every": 2}
    check(cp=2, tp=2, context={"method": "ring"}, model=model, steps=5)


@pytest.mark.distributed
@pytest.mark.slow
def test_all_five_with_replicas():
    """16 ranks: tp 2 x pp 2 x cp 2 x dp 2, experts over 4 with 2 replicas."""
    model = {"layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 4, "moe": EXPERTS}
    pipeline = {"schedule": "gis", "chunks": 2, "vocab": "balanced"}
    check(cp=2, tp=2, pp=2, dp=2, ep=4, context={"method": "ring"}, model=model, pipeline=pipeline, masked=True,
          sharding="zero1", steps=5)  # fmt: skip
