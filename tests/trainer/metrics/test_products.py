"""The ceiling is measured in the products that the model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pentad.configs.schema import MoeConfig
from pentad.models.costs.flops import step_flops
from pentad.trainer.metrics.products import Product, ceiling_tflops, products_of
from tests.training import job


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tp": 2, "cp": 2},
        {"model": {"kv_heads": 2}},
        {"model": {"moe": MoeConfig(experts=4, top_k=2, ffn=32)}, "ep": 2},
    ],
)
def test_the_products_are_those_of_the_models_flops(given: dict[str, Any]) -> None:
    cfg = job(**given)
    tokens = cfg.train.micro_batch * cfg.train.seq_len
    whole = step_flops(cfg.model, tokens, 0.0).total / 3
    ranks = cfg.parallel.tp * cfg.parallel.cp
    assert sum(each.count * each.flops for each in products_of(cfg)) == pytest.approx(whole / ranks)


def test_a_ceiling_is_a_rate_weighed_by_how_often_a_product_occurs() -> None:
    small, large = Product(8, 8, 8, 1.0), Product(256, 256, 256, 1.0)
    device, dtype, met = torch.device("cpu"), torch.float32, []
    rates = [
        ceiling_tflops(each, device, dtype, seconds=0.01, barrier=lambda: met.append(1))
        for each in ([small], [large], [small, large])
    ]
    assert rates[0] < rates[2] and rates[0] < rates[1] and len(met) == 6
