"""The benchmark of part-stages runs, and both sides train the same."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import part_stages


def test_a_small_case_runs_and_losses_are_equal() -> None:
    found = part_stages.measure(2, hidden=32, seq_len=16, warmup=1)
    assert found.same and len(found.cpu) == len(found.wall) == 2
    assert all(min(pair) > 0 for pair in found.wall)
    assert part_stages.row("wall", found.wall).startswith("| wall | ")
