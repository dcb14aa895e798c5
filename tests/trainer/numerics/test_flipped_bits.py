"""Bits that flip in guarded memory are found before the update that would use them, and rank and place are named."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.trainer.numerics.flips import KINDS, Flip, Told, train_with_flip
from tests.training import job, world_of

GUARDED = {"steps": 3, "dtype": "bf16"}
STATE = {"numerics": {"replicas_every": 1, "checksums": True}}
PARTS = {"numerics": {"recompute": True}, "recompute": "full"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-dp2-zero1": {"tp": 2, "dp": 2, "sharding": "zero1"},
    "dp2-pp2-ddp": {"dp": 2, "pp": 2, "sharding": "ddp"},
}
CASES = [(kind, layout, seed) for seed in range(4) for layout in LAYOUTS for kind in KINDS]


@pytest.mark.distributed
@pytest.mark.sample(6)
@pytest.mark.parametrize(("kind", "layout", "seed"), CASES)
def test_a_flipped_bit_is_found_and_its_place_named(kind: str, layout: str, seed: int) -> None:
    cfg = job(**LAYOUTS[layout], **GUARDED, **(PARTS if kind == "recomputed" else STATE))
    flip = Flip.draw(seed, kind, world_of(cfg), cfg.train.steps)
    ranks: list[Told] = run_distributed(train_with_flip, world_of(cfg), cfg, flip, group=False)
    flipped = ranks[flip.rank].flipped
    assert flipped is not None
    assert {told.step for told in ranks} == {flip.step}
    assert {told.found for told in ranks} == {ranks[0].found}
    found = ranks[0].found
    assert found is not None
    # What is recomputed has no name but its number in its layer.
    named = [(place.rank, place.what, place.name.split(" of ")[-1]) for place in found.places]
    assert named == [(flip.rank, flipped.what, flipped.name)]
