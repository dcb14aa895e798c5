"""Stragglers are found by their loads against their peers', with a reason, and nobody is blamed without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pentad.parallel.record.parts import AT, DURATIONS, OWN, QUEUED, SECONDS, TimePart
from pentad.parallel.record.stragglers import Reason, Stragglers, StragglerVerdict

STEP_S, NOISE = 0.1, 0.02


def _rows(draws: np.random.Generator, own: np.ndarray, **parts: float | np.ndarray) -> np.ndarray:
    """(ranks, numbers) of one step in which each rank was busy for `own` seconds, give or take 2 %."""
    rows = np.zeros((len(own), DURATIONS))
    rows[:, OWN] = own * (1 + NOISE * draws.standard_normal(len(own)))
    for name, values in parts.items():
        rows[:, QUEUED if name == "queued" else AT[TimePart(name)]] = values
    rows[:, SECONDS] = rows[:, OWN].max() + 0.02
    return rows


def _run(
    roles: list[int],
    own: Callable[[int], np.ndarray],
    steps: int = 100,
    work: np.ndarray | None = None,
    **parts: float | np.ndarray,
) -> list[StragglerVerdict]:
    draws, stragglers, found = np.random.default_rng(5), Stragglers(roles), []
    for step in range(steps):
        given = np.ones(len(roles)) if work is None else work
        verdict = stragglers.step(step + 1, _rows(draws, own(step), **parts), given)
        found += [] if verdict is None else [verdict]
    return found


def _slow(count: int, rank: int, factor: float) -> np.ndarray:
    own = np.full(count, STEP_S)
    own[rank] *= factor
    return own


@pytest.mark.parametrize("count", (2, 4, 8))
@pytest.mark.parametrize("factor", (1.1, 1.3, 2.0))
def test_a_slow_rank_is_confirmed_in_its_third_window(count: int, factor: float) -> None:
    found = _run([0] * count, lambda _: _slow(count, 1, factor))
    assert [verdict.step for verdict in found] == [20, 40, 60, 80, 100]
    assert [verdict.rank for verdict in found] == [1] * 5
    last = found[-1]
    assert [verdict.confirmed for verdict in found] == [False, False, True, True, True]
    assert last.reason == Reason.COMPUTE
    assert last.score == pytest.approx(1 / factor, abs=0.02)
    assert last.cost == pytest.approx(STEP_S * (factor - 1) / (STEP_S * factor + 0.02), abs=0.03)


def test_a_steady_rank_is_confirmed_where_no_window_alone_is_sure_and_noise_is_not() -> None:
    def scattered(factor: float, steps: int, seed: int) -> list[StragglerVerdict]:
        draws = np.random.default_rng(seed)
        return _run([0] * 8, lambda _: _slow(8, 3, factor) * (1 + 0.11 * draws.standard_normal(8)), steps)

    found = scattered(1.12, 200, 3)
    assert sum(verdict.z > 4 and verdict.score < 0.93 for verdict in found[:6]) < 3
    assert any(verdict.confirmed and verdict.rank == 3 and verdict.reason == Reason.COMPUTE for verdict in found)
    assert not any(verdict.confirmed for seed in range(3) for verdict in scattered(1.0, 2000, seed))


def test_a_burst_and_noise_are_no_stragglers() -> None:
    burst = _run([0] * 8, lambda step: _slow(8, 3, 1.5 if 30 <= step < 50 else 1.0), 400)
    assert not any(verdict.confirmed for verdict in burst)
    assert all(verdict.reason is None for verdict in burst if verdict.step > 60)
    clean = _run([0, 0, 1, 1, 2, 2, 3, 3], lambda _: np.repeat([1.0, 2.0, 0.5, 1.3], 2) * STEP_S, 1000)
    assert not any(verdict.confirmed or verdict.reason for verdict in clean)


def test_stages_are_not_compared_with_each_other_but_with_their_own_past() -> None:
    def own(step: int) -> np.ndarray:
        skewed = np.array([0.5, 1.0, 1.0, 2.0]) * STEP_S * (1.3 if step > 50 else 1.0)  # a slower clock for all
        skewed[1] *= 1.5 if step >= 200 else 1.0
        return skewed

    found = _run([0, 1, 2, 3], own, 400)
    assert not any(verdict.reason for verdict in found if verdict.step <= 200)
    assert found[-1].rank == 1 and found[-1].confirmed and found[-1].score == pytest.approx(1 / 1.5, abs=0.03)


def test_more_work_is_an_imbalance_and_slow_work_is_not() -> None:
    work = np.array([0.8, 0.8, 0.8, 1.6])
    (*_, fair) = _run([0] * 4, lambda _: work * STEP_S, work=work)
    assert fair.rank is None and fair.reason == Reason.IMBALANCE and not fair.confirmed
    assert fair.score == pytest.approx(0.5, abs=0.03)
    (*_, slow) = _run([0] * 4, lambda _: work * STEP_S * _slow(4, 0, 1.5) / STEP_S, work=work)
    assert slow.rank == 0 and slow.reason == Reason.COMPUTE and slow.confirmed


def test_time_that_does_not_follow_the_work_makes_nobody_slow_and_hides_nobody() -> None:
    draws = np.random.default_rng(7)
    stragglers, found = Stragglers([0] * 8), []
    for step in range(100):
        work = np.array([1.1, 0.8, 0.85, 1.1, 1.3, 0.8, 1.05, 1.0]) + 0.1 * draws.standard_normal(8)
        verdict = stragglers.step(step + 1, _rows(draws, _slow(8, 6, 1.1)), work)
        found += [] if verdict is None else [verdict]
    assert [(verdict.rank, verdict.reason) for verdict in found] == [(6, Reason.COMPUTE)] * 5
    assert found[-1].confirmed and np.delete(found[-1].scores, 6).min() > 0.97


@pytest.mark.parametrize(
    ("cause", "reason"),
    [("data", Reason.DATA), ("dp", Reason.NETWORK), ("gc", Reason.GC), ("contention", Reason.CONTENTION)],
)
def test_the_reason_is_what_the_rank_exceeds_its_peers_in(cause: str, reason: Reason) -> None:
    excess = np.array([0.001, 0.001, 0.05, 0.001])
    if cause == "contention":
        (*_, last) = _run([0] * 4, lambda _: STEP_S + excess, contention=excess, queued=0.9 * excess)
        (*_, asleep) = _run([0] * 4, lambda _: STEP_S + excess, contention=excess)
        assert asleep.rank == 2 and asleep.reason == Reason.COMPUTE
    else:
        parts: dict[str, Any] = {cause: excess}
        (*_, last) = _run([0] * 4, lambda _: np.full(4, STEP_S), **parts)
    assert last.rank == 2 and last.reason == reason and last.confirmed
