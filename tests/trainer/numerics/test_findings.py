"""What all ranks conclude from what each has found."""

from __future__ import annotations

from pathlib import Path

from pentad.trainer.numerics.findings import ChangedBits, DifferentCopies, RankFindings, conclude


def _copies(sums: dict[int, tuple[int, int]], changed: dict[int, ChangedBits] | None = None) -> list[RankFindings]:
    holders, names = tuple(sums), ("norm", "up")
    told = changed or {}
    return [
        RankFindings(rank, f"n{rank}", (told[rank],) if rank in told else (), (DifferentCopies(holders, names, each),))
        for rank, each in sums.items()
    ]


def test_the_minority_of_the_copies_is_the_suspect() -> None:
    found = conclude(7, _copies({0: (1, 5), 1: (1, 5), 2: (1, 6), 3: (1, 5)}))
    assert [(place.rank, place.host, place.name) for place in found.places] == [(2, "n2", "up")]
    assert found.places[0].window == "differs from that of rank 0, 1, 3"
    assert not found.undecided


def test_of_two_copies_both_are_named_unless_checksums_have_seen_one() -> None:
    both = conclude(7, _copies({0: (1, 5), 3: (1, 6)}))
    assert [(place.rank, place.name) for place in both.places] == [(0, "up"), (3, "up")]
    assert both.undecided and "faults.numerics.checksums" in both.text(None)
    seen = ChangedBits(3, "n3", "parameter", "up", "changed")
    one = conclude(7, _copies({0: (1, 5), 3: (1, 6)}, {3: seen}))
    assert one.places == (seen,)
    assert not one.undecided


def test_a_tie_of_two_against_two_names_all() -> None:
    found = conclude(7, _copies({0: (1, 5), 1: (1, 6), 2: (1, 5), 3: (1, 6)}))
    assert [place.rank for place in found.places] == [0, 1, 2, 3]
    assert found.undecided


def test_the_line_names_places_the_good_step_and_the_checkpoint() -> None:
    places = tuple(ChangedBits(rank, "node", "master", f"layers.{rank}", "changed in step 4") for rank in range(5))
    findings = [RankFindings(1, "node", places, good=3), RankFindings(0, "node", good=2)]
    found = conclude(4, findings)
    text = found.text(Path("runs/a/step-00000002"))
    assert "\n" not in text
    for part in ("found in step 4", "master layers.0 on rank 0 (node) changed in step 4", "and 2 more places"):
        assert part in text
    assert "after step 2 was the last found good" in text and "checkpoint.resume=runs/a/step-00000002" in text
    assert "no checkpoint" in found.text(None)
    assert len(found.events()) == 5
    assert found.events()[1] == {
        **{"rank": 1, "host": "node", "what": "master", "name": "layers.1", "window": "changed in step 4"},
        **{"step": 4, "good_step": 2},
    }
