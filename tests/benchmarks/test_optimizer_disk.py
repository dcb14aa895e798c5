"""The benchmark of states on a disk, our side in small: its pool is three subgroups, and no file is left."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import optimizer_disk


def test_the_host_holds_three_subgroups(tmp_path: Path) -> None:
    found = optimizer_disk.pentad(3, tmp_path, 4.0)
    # Of a subgroup the master and both moments, each in whole pages.
    assert 0.9 * 3 * (4 << 20) < found["pool"] <= 3 * ((4 << 20) + 3 * 4096)
    assert found["pool"] < 12 * 3 * (1 << 20) / 2 and list(tmp_path.iterdir()) == []
