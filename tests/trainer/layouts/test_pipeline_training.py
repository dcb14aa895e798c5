"""Every schedule, with every placement of the vocabulary, trains like one process (DESIGN invariant 1)."""

from __future__ import annotations

from typing import Any

import pytest

from pentad.configs.tables.schedules import SCHEDULES
from tests.covering import Case, pairwise
from tests.same_training import check

STEPS = 5
BALANCED = {name for name, schedule in SCHEDULES.items() if schedule.balanced}
VEE = {name for name, schedule in SCHEDULES.items() if schedule.placement == "vee"}
FACTORS: dict[str, list[Any]] = {
    "schedule": [
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved", 2),
        ("interleaved", 3),
        ("gis", 2),
        ("zb-h1", 1),
        ("zb-h2", 1),
        ("zb-v", 2),
        ("v-half", 2),
        ("v-min", 2),
        ("dualpipev", 2),
    ],
    "vocab": ["ends", "balanced-1", "balanced-2"],
    "tied": [False, True],
    "layout": [(2, 1, 2), (2, 2, 1), (2, 2, 2), (4, 1, 1), (4, 2, 1), (4, 1, 2), (8, 1, 1)],  # pp, tp, dp
    "microbatches": ["1", "p-1", "p", "2p+3"],
    "dtype": ["fp64", "fp32"],
    "sharding": ["ddp", "zero1"],
    "recompute": ["none", "full"],
    "documents": [False, True],
}


def _allowed(case: Case) -> bool:
    return case["vocab"] == "ends" or case["schedule"][0] in BALANCED


CASES = pairwise(FACTORS, _allowed, seed=3)


def settings(case: Case) -> dict[str, Any]:
    """A case as arguments of `job`."""
    (name, chunks), (pp, tp, dp) = case["schedule"], case["layout"]
    count = {"1": 1, "p-1": pp - 1, "p": pp, "2p+3": 2 * pp + 3}[case["microbatches"]]
    vocab, _, barriers = case["vocab"].partition("-")
    fp64 = case["dtype"] == "fp64"
    return {
        "pp": pp,
        "tp": tp,
        "dp": dp,
        "pipeline": {"schedule": name, "chunks": chunks, "vocab": vocab, "vocab_barriers": int(barriers or 1)},
        "model": {"tied": case["tied"], "layers": 5},
        "sharding": case["sharding"],
        "recompute": case["recompute"],
        "dtype": case["dtype"],
        "optim": "adamw" if fp64 else "sgd",
        "steps": STEPS,
        "micro_batch": 2,
        "global_batch": 2 * dp * count,
    }


def _name(case: Case) -> str:
    layout = "x".join(str(n) for n in case["layout"])
    words = ["".join(str(x) for x in case["schedule"]), case["vocab"], layout, case["microbatches"], case["dtype"]]
    words += [case["sharding"], case["recompute"]]
    return "-".join([*words, *(word for word in ("tied", "documents") if case[word])])


@pytest.mark.sample(3)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=_name(c), marks=[] if i % 8 == 0 else pytest.mark.slow) for i, c in enumerate(CASES)],
)
def test_schedule(case):
    check(masked=case["documents"], **settings(case))


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("vocab", ["ends", "balanced"])
def test_dropout_and_learned_positions(vocab):
    model = {"dropout": 0.1, "position": "learned", "norm": "layer", "layers": 3, "tied": True}
    check(pp=2, tp=2, model=model, pipeline={"schedule": "gis", "chunks": 2, "vocab": vocab}, steps=STEPS)


@pytest.mark.distributed
def test_stages_as_the_user_splits_them():
    """Unequal and empty stages, the last one of them."""
    pipeline = {"schedule": "interleaved", "chunks": 2, "layers": (0, 3, 2, 0)}
    check(pp=2, dp=2, model={"layers": 5}, pipeline=pipeline, steps=STEPS)


def test_the_cases_cover_what_they_should():
    assert {c["schedule"][0] for c in CASES if c["vocab"] != "ends"} == BALANCED
    assert {c["schedule"][0] for c in CASES if c["tied"]} >= VEE
    assert len(CASES) < 120
