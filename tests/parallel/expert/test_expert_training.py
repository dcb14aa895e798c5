"""Jobs with every way of dispatching train like one process (the wider grid: trainer/test_moe_training.py)."""

from __future__ import annotations

import pytest

from pentad.configs.schema import MoeConfig
from tests.same_training import check

PADDED = {"capacity_factor": 1.0, "pad": True}
CASES = {
    "chunks over ep and etp, all recomputed": (
        {"overlap_chunks": 3, "weigh": "before", "shared": 16},
        {"tp": 2, "dp": 2, "ep": 2, "etp": 2, "recompute": "full"},
    ),
    "padded chunks, ep above dp": ({**PADDED, "overlap_chunks": 2}, {"tp": 2, "dp": 2, "ep": 4}),
    "gathered, ep above dp": ({"dispatcher": "all_gather"}, {"tp": 4, "ep": 2, "etp": 2}),
    "chunks and split backward": (
        {"overlap_chunks": 2},
        {"tp": 2, "pp": 2, "etp": 2, "sharding": "zero1", "pipeline": {"schedule": "zb-h1"}},
    ),
}


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_trains_like_one_process(case):
    settings, layout = CASES[case]
    check(model={"moe": MoeConfig(experts=8, top_k=2, ffn=24, bias=True, **settings), "layers": 3}, steps=4, **layout)
