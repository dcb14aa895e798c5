"""Who takes which slot when the layout changes."""

from __future__ import annotations

import pytest

from pentad.launch.supervise.seats import seated
from pentad.trainer.recovery.ways import Way

DP4 = Way("", "", 4)
TWO_BY_FOUR = Way("", "", 8, block=2)
"""tp 2, dp 4: replica r has the slots 2r and 2r + 1."""
STAGES = Way("", "", 8, stages=2, block=2)
"""tp 2, pp 2, dp 2: stage s, replica r and tensor rank t have the slot 4s + 2r + t."""


def test_whoever_is_left_stays_in_order_and_others_come_behind() -> None:
    assert seated(DP4, Way("shrink", "dp=3", 3), (0, 1, 5, 3), {1}, []) == (0, 5, 3)
    assert seated(Way("shrink", "dp=3", 3), DP4, (0, 5, 3), (), [9, 7]) == (0, 5, 3, 9)
    assert seated(DP4, Way("shrink", "dp=2", 2), (0, 1, 2, 3), {1}, []) == (0, 2)


def test_whole_replicas_stay_and_broken_ones_mend_each_other() -> None:
    members = tuple(range(8))
    assert seated(TWO_BY_FOUR, Way("shrink", "dp=3", 6, block=2), members, {3}, []) == (0, 1, 4, 5, 6, 7)
    # Of two broken replicas one whole one is made, each of its ranks with the part of the model that it has.
    assert seated(TWO_BY_FOUR, Way("shrink", "dp=3", 6, block=2), members, {3, 4}, []) == (0, 1, 2, 5, 6, 7)


def test_stages_keep_their_own() -> None:
    members = tuple(range(8))
    assert seated(STAGES, Way("shrink", "dp=1", 4, stages=2, block=2), members, {7}, []) == (0, 1, 4, 5)
    assert seated(Way("shrink", "dp=1", 4, stages=2, block=2), STAGES, (0, 1, 4, 5), (), [2, 3, 6, 8]) == (
        *(0, 1, 2, 3),
        *(4, 5, 6, 8),
    )


def test_the_first_slots_process_stays_first_and_a_lost_one_is_followed() -> None:
    members = tuple(range(8))
    # Its replica is broken, and it takes the first place of another one all the same: the run's files are open in it.
    shrunk = seated(TWO_BY_FOUR, Way("shrink", "dp=3", 6, block=2), members, {1}, [])
    assert shrunk[0] == 0 and len(set(shrunk)) == 6
    assert seated(DP4, Way("shrink", "dp=3", 3), (0, 1, 2, 3), {0}, []) == (1, 2, 3)


def test_another_layout_is_filled_in_order_and_too_few_are_refused() -> None:
    assert seated(STAGES, Way("layouts", "pp=1 dp=3", 6, block=2), tuple(range(8)), {0, 5}, []) == (1, 2, 3, 4, 6, 7)
    with pytest.raises(ValueError, match="4 slots, and 3 processes"):
        seated(DP4, DP4, (0, 1, 2, 3), {2}, [])
