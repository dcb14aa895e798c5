"""The memory model against the peak of live tensors that random jobs really have, on every rank."""

from __future__ import annotations

import pytest

from pentad.configs.schema import Config
from tests.measured_memory import compare
from tests.trainer.memory.layouts import draw_job, draw_shared

WITHIN = 0.05
LEAST = 64 << 20
SEEDS = range(30)
SAMPLE = (16,)
"""Of `make test`: a pipeline of experts with everything made again."""
SHARED = (11,)


@pytest.mark.distributed
@pytest.mark.parametrize("seed", [pytest.param(s, marks=[] if s in SAMPLE else pytest.mark.slow) for s in SEEDS])
def test_peak_is_what_the_model_says(seed: int) -> None:
    _check(draw_job(seed))


@pytest.mark.distributed
@pytest.mark.parametrize("seed", [pytest.param(s, marks=[] if s in SHARED else pytest.mark.slow) for s in range(12)])
def test_peak_with_some_tokens_made_again_is_what_the_model_says(seed: int) -> None:
    _check(draw_shared(seed))


def _check(cfg: Config) -> None:
    ranks = compare(cfg)
    assert max(each.measured.peak for each in ranks) >= LEAST
    for each in ranks:
        assert abs(each.error) < WITHIN, f"place {each.measured.place}: {each.measured.peak}, {each.predicted}, {cfg}"
