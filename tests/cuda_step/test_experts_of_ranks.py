"""A layer of experts on two ranks, as one of them asks its GPU and the other rank for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.configs.schema import MoeConfig
from pentad.models.moe import Experts, Moe
from pentad.models.sequences import Sequences
from pentad.parallel.comm.axis import Axis
from pentad.parallel.expert.dispatch import AllToAll
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout
from tests.cuda_step.collectives import StandIn
from tests.cuda_step.trace import tracing
from tests.training import TINY

TOKENS, EXPERTS, TOP_K = 64, 8, 2
ROWS = TOKENS * TOP_K
SEND, RECEIVE, GROUPS = [50, 78], [50, 30], [7, 33, 0, 40]


@pytest.mark.parametrize("before", [False, True])
def test_a_layer_waits_once_for_the_numbers_of_rows_that_travel(before: bool) -> None:
    moe = MoeConfig(experts=EXPERTS, top_k=TOP_K, ffn=48, shared=32, weigh="before" if before else "after")
    cfg = replace(TINY, moe=moe)
    with torch.device("meta"):
        layer = Moe(cfg, 0)
        layer.experts = Experts(replace(cfg, moe=replace(moe, experts=EXPERTS // 2)))
    layer = layer.to(torch.bfloat16)
    layer.router.tally = torch.empty(8 + EXPERTS, dtype=torch.float64, device="meta")
    layer.dispatch = AllToAll(EXPERTS, Axis("ep", 0, 2, (0, 1)), Axis.single("etp"), weigh_before=before)
    places = torch.arange(TOKENS, device="meta")
    seq = Sequences(1, TOKENS, None, None, TokenLayout((TokenIndex.whole(TOKENS),)), places * 0, 1.0, None, places)

    def answer(x: Tensor, where: str) -> Any:
        return [*SEND, *RECEIVE, sum(GROUPS), *GROUPS]

    with StandIn().standing_in() as ranks, tracing(answer) as trace:
        x = torch.empty(TOKENS, cfg.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
        layer(x, seq).backward(torch.empty(TOKENS, cfg.hidden, dtype=torch.bfloat16, device="meta"))
    assert trace.waits == {"tolist @ parallel.expert.plan:by_count": 1}
    assert all(each.waited == 1 for each in ranks.asked)
    there, back = (RECEIVE, SEND), (SEND, RECEIVE)
    numbers, *journeys = [each.rows for each in ranks.asked]
    assert numbers == (None, None)
    # Rows go there and come back, forward and backward; where weights travel along, so do they and their gradients.
    assert sorted(journeys) == sorted([there, back] * (3 if before else 2))
