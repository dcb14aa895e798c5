"""What the benchmark of the record's cost makes of the times of steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import record_cost


def test_the_cost_is_found_under_noise_and_lies_in_its_interval() -> None:
    draws = np.random.default_rng(3)
    on = np.arange(2000) // record_cost.BLOCK % 2 == 0
    seconds = 0.01 + 0.0002 * on + draws.exponential(0.0004, 2000)
    differences, without = record_cost.compare(seconds)
    assert len(differences) == 98 and np.median(without) == pytest.approx(0.0104, abs=0.0002)
    middle, low, high = record_cost.interval(differences)
    assert low < middle < high and low < 0.00021 and high > 0.00019 and high - low < 0.0002
    none = record_cost.interval(record_cost.compare(seconds - 0.0002 * on)[0])
    assert abs(none[0]) < 0.00006
