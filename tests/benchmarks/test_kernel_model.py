"""The model of a step's time on a GPU: it prices a known trace as was done by hand, and its MFU may only rise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import kernel_model

FIRST = {"1B": 43.5, "3B": 46.7, "8B": 49.1, "8x8B": 45.2}
"""MFU in per cent of the first traces of all, before any kernel was fused."""
LEAST = {"1B": 62.1, "3B": 63.4, "8B": 66.5, "8 x 8B": 67.1}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_traces_have_the_mfu_that_was_found_for_them(name: str) -> None:
    """first_traces.json: FLOPs that count, and kernels as [kind, how many, FLOPs, bytes]."""
    trace = json.loads(Path(__file__).with_name("first_traces.json").read_text())[name]
    times = {
        rates: sum(n * rates.seconds(kind, flops, nbytes) for kind, n, flops, nbytes in trace["kernels"])
        for rates in (kernel_model.FLASH_2, kernel_model.HOPPER)
    }
    mfu = [100 * trace["flops"] / (kernel_model.PEAK * seconds) for seconds in times.values()]
    assert mfu[0] == pytest.approx(FIRST[name], abs=0.1)
    assert 2 < mfu[1] - mfu[0] < 8  # attention alone


@pytest.mark.parametrize(
    "name", ["1B", "8 x 8B", pytest.param("3B", marks=pytest.mark.slow), pytest.param("8B", marks=pytest.mark.slow)]
)
def test_the_mfu_of_the_code_as_it_is_does_not_fall(tmp_path: Path, name: str) -> None:
    found = kernel_model.estimate(kernel_model.CASES[name], tmp_path)
    assert 100 * found.mfu >= LEAST[name]
    products = found.seconds["products"] * kernel_model.HOPPER.flops["product"]
    attention = found.flops - products
    # What is computed is what counts, and attention's backward pass makes its scores again.
    assert 0 < attention < 1.2 * found.seconds["attention"] * kernel_model.HOPPER.flops["attention"]


def test_flops_that_are_not_known_have_no_price() -> None:
    with pytest.raises(ValueError, match="depend on values"):
        kernel_model.HOPPER.seconds("attention", float("nan"), 0.0)
