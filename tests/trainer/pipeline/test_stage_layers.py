"""Stages that get no layer are warned of, unless they were asked for."""

from __future__ import annotations

import pytest

from pentad.configs import load
from pentad.trainer.pipeline.stage_layers import StageLayers, empty_stages

TINY = ["model.layers=4", "model.hidden=64", "model.heads=4", "model.ffn=128", "model.vocab=320"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel.pp=8"], ["8 stages of model.layers=4"]),
        (["parallel.pp=4", "parallel.pipeline.chunks=2"], ["4 x parallel.pipeline.chunks=2 makes 8 stages"]),
        # As many layers as stages, and a head that costs more than all of them.
        (["parallel.pp=4", "model.vocab=32000", "train.seq_len=8"], ["4 stages of model.layers=4", "vocab=balanced"]),
    ],
)
def test_stages_without_layers_are_warned_of(overrides: list[str], parts: list[str]) -> None:
    cfg = load(None, [*TINY, *overrides])
    counts = StageLayers.of(cfg).counts
    assert sum(counts) == 4
    (warning,) = empty_stages(cfg)
    assert f"{counts.count(0)} have no layer ({' '.join(map(str, counts))})" in warning.message
    assert all(part in warning.message for part in parts)


@pytest.mark.parametrize(
    "overrides",
    [[], ["parallel.pp=2"], ["parallel.pp=8", "parallel.pipeline.layers=[1, 0, 1, 0, 1, 0, 1, 0]"]],
)
def test_nothing_to_say(overrides: list[str]) -> None:
    assert not empty_stages(load(None, [*TINY, *overrides]))
