"""The simulated world: one rank's start, save and load, counted."""

from __future__ import annotations

from benchmarks.world_growth import rows_of, table


def test_a_rank_of_a_stood_in_world_starts_saves_and_loads() -> None:
    rows = rows_of([8, 16])
    assert [(row.world, row.rank, row.part) for row in rows] == [
        (world, rank, part) for world in (8, 16) for rank in (0, world - 1) for part in ("start", "save", "load")
    ]
    assert all(row.spent.calls > 0 and row.spent.sent > 0 and row.spent.seconds > 0 for row in rows)
    saves = {(row.world, row.rank): row.spent.files for row in rows if row.part == "save"}
    assert saves[8, 0] > saves[8, 7] >= 1, "only the first rank writes what all need, and each its own tensors"
    assert len(table(rows)) == 2 + len(rows)
