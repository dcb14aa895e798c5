"""Which layouts a job can go on in, and in which order."""

from __future__ import annotations

import json

import pytest

from pentad.configs import load
from pentad.configs.strict_json import JsonError
from pentad.trainer.recovery.ways import Ladder, Way, ways

_TINY = [
    *("model.layers=8", "model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=48", "model.vocab=320"),
    *("train.seq_len=16", "train.steps=2", "train.micro_batch=1", "train.device=cpu", "faults.recover=true"),
]


def test_sizes_that_the_batch_allows_then_the_layouts_of_the_list() -> None:
    given = ["parallel.tp=2", "parallel.dp=4", "train.global_batch=24", "faults.layouts=[pp=4 tp=1, tp=1 pp=2 dp=1]"]
    assert ways(load(None, [*_TINY, *given])) == (
        Way("", "", 8, 1, 2),
        Way("shrink", "dp=3", 6, 1, 2),
        Way("shrink", "dp=2", 4, 1, 2),
        Way("shrink", "dp=1", 2, 1, 2),
        Way("layouts", "pp=4 tp=1 dp=1", 4, 4, 1),
        Way("layouts", "tp=1 pp=2 dp=1", 2, 2, 1),
    )
    odd = load(None, [*_TINY, "parallel.dp=4", "train.global_batch=8", "faults.ladder=[layouts,shrink]"])
    assert [way.layout for way in ways(odd)] == ["", "dp=2", "dp=1"]
    experts = ["model.moe.experts=4", "model.moe.ffn=32", "parallel.dp=4", "parallel.ep=2", "train.global_batch=24"]
    assert [way.layout for way in ways(load(None, [*_TINY, *experts]))] == ["", "dp=2"]


def test_a_ladder_is_read_as_it_was_written() -> None:
    ladder = Ladder.of(load(None, [*_TINY, "parallel.dp=4", "train.global_batch=8", "faults.ladder=[spare,shrink]"]))
    assert ladder.rungs == ("spare", "shrink") and ladder.grow and len(ladder.ways) == 3
    assert Ladder.load(json.loads(json.dumps(ladder.dump()))) == ladder
    for wrong in ([1, "", 2, 1, 1], ["", "", 3, 2, 1], ["", "", 3]):
        with pytest.raises(JsonError):
            Way.load(wrong)
