"""The benchmark of an emulated copy engine runs, and finds what does not depend on the clock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import job_store, run_distributed

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import offload_waiting
from offload_waiting import Setting, median_interval


def _measured(rank: int, world: int, setting: Setting) -> Any:
    return offload_waiting.measure(rank, setting, job_store())


@pytest.mark.distributed
def test_a_small_case_runs_and_its_counted_peak_is_the_simulators() -> None:
    setting = Setting("gis", 2, 0.5, microbatches=6, pass_s=0.004, kept=64 << 10, steps=2)
    ranks = run_distributed(_measured, 4, setting, group=False)
    for found in ranks:
        assert len(found.seconds) == 2 and all(min(pair) > 0 for pair in found.seconds)
        assert found.peaks == ranks[0].peaks and found.peaks[1] < found.peaks[0]
        plain, moved = (peak * setting.chunks * setting.kept for peak in found.planned_peaks)
        assert found.peaks == pytest.approx((plain, moved), rel=0.05)
        assert 0 < found.share < 1 and found.planned >= 1
    assert "| gis, 2 chunks | 0.5 |" in offload_waiting.row(setting, ranks[0])


def test_the_interval_of_a_median_is_that_of_its_order_statistics() -> None:
    # For 30 values the 10th and the 21st, for 6 the extremes: the sums of binomial coefficients over 2^n.
    assert median_interval([float(i) for i in range(1, 31)]) == (15.5, 10.0, 21.0)
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (3.5, 1.0, 6.0)
