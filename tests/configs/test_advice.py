"""What is right and only slower, or without effect, is accepted, and said in one line."""

from __future__ import annotations

import pytest

from pentad.configs import load, warnings
from tests.jobs import DENSE

TINY = ["model.layers=4", "model.hidden=64", "model.heads=4", "model.ffn=128"]
HYBRID = [*TINY, "model.attention_every=2", "parallel.cp=2", "train.seq_len=64"]
BY_LENGTH = [*TINY, "parallel.cp=2", "parallel.context.placement=by_length"]


@pytest.mark.parametrize(
    ("overrides", "key", "fragments"),
    [
        ([*HYBRID, "parallel.context.method=ring"], "parallel.context.method", ["ring", "idle", "ulysses"]),
        ([*HYBRID, "parallel.context.method=tokenring"], "parallel.context.method", ["tokenring"]),
        ([*HYBRID, "parallel.context.method=usp"], "parallel.context.method", ["usp"]),
        ([*BY_LENGTH, "parallel.context.method=allgather"], "parallel.context.placement", ["allgather", "ring"]),
        ([*BY_LENGTH, "parallel.context.method=ulysses"], "parallel.context.placement", ["ulysses", "saves nothing"]),
        ([*TINY, "parallel.pipeline.schedule=zb-v"], "", ["pipeline.schedule has no effect with parallel.pp=1"]),
        ([*TINY, "parallel.pipeline.vocab=balanced"], "", ["parallel.pipeline.vocab has no effect"]),
        ([*TINY, "parallel.pipeline.layers=[4, 4]"], "", ["parallel.pipeline.layers has no effect"]),
    ],
)
def test_one_line_of_warning(overrides: list[str], key: str, fragments: list[str]) -> None:
    (warning,) = warnings(load(None, overrides))
    assert warning.key == key
    for fragment in fragments:
        assert fragment in warning.message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*TINY, "data.prefetch=0"],
        [*HYBRID, "parallel.context.method=ulysses"],
        [*HYBRID, "parallel.context.method=auto"],
        [*BY_LENGTH, "parallel.context.method=ring"],
        [*TINY, "parallel.pipeline.schedule=1f1b", "parallel.pipeline.chunks=1"],
        [*TINY, "parallel.pp=4"],
    ],
)
def test_nothing_to_say(overrides: list[str]) -> None:
    assert not warnings(load(None if overrides else DENSE, overrides))


def test_a_shortened_schedule_is_among_the_warnings() -> None:
    assert [w.key for w in warnings(load("demo", ["train.steps=3"]))] == ["optim.schedule.warmup_steps"]
