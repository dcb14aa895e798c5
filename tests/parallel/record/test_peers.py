"""What a rank is compared with."""

from __future__ import annotations

import numpy as np
import pytest

from pentad.parallel.record.peers import median_of_others, share_by_work


@pytest.mark.parametrize("count", range(2, 10))
def test_the_median_of_the_others_is_that_without_the_rank(count: int) -> None:
    values = np.random.default_rng(count).integers(0, 5, (7, count)).astype(float)  # some are equal
    expected = np.stack([np.median(np.delete(values, rank, 1), 1) for rank in range(count)], 1)
    np.testing.assert_array_equal(median_of_others(values), expected)
    np.testing.assert_array_equal(median_of_others(values[0]), expected[0])


@pytest.mark.parametrize("share", (0.0, 0.4, 1.0))
@pytest.mark.parametrize("slow", (1.0, 1.1, 2.0))
def test_what_follows_work_is_learned_from_ranks_of_which_one_may_be_slow(share: float, slow: float) -> None:
    draws = np.random.default_rng(5)
    roles = np.array([0, 1] * 4)
    work = 1 + 0.2 * draws.standard_normal((20, 8))
    own = (1 + share * (work - 1)) * np.where(roles, 0.3, 0.1) * (1 + 0.02 * draws.standard_normal((20, 8)))
    own *= 1 + 0.3 * draws.random((20, 1))  # steps differ
    own[:, 6] *= slow
    assert share_by_work(own, work, roles, without=6) == pytest.approx(share, abs=0.06)


def test_where_all_have_the_same_work_time_counts_as_it_is() -> None:
    own = np.full((20, 4), 0.1)
    assert share_by_work(own, np.ones((20, 4)), np.zeros(4, int)) == 1.0
    assert share_by_work(own, 1 + np.eye(20, 4), np.arange(4)) == 1.0, "nobody has a peer"
