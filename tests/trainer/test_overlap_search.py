"""The search for the number of chunks."""

from __future__ import annotations

import pytest

from pentad.trainer.overlap import ChunkSearch


def _search(times: dict[int, list[float]], **settings) -> tuple[ChunkSearch, list[int]]:
    search, proposed = ChunkSearch(tuple(times), **settings), []
    left = {degree: iter(values) for degree, values in times.items()}
    while search.chosen is None:
        proposed.append(search.propose())
        search.observe(next(left[proposed[-1]]))
    return search, proposed


def test_tries_all_then_stays_with_the_fastest():
    search, proposed = _search({1: [3, 3, 3], 2: [2, 2, 2], 4: [4, 4, 4]}, warm_up=0, steps=3)
    assert proposed == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert search.chosen == search.propose() == 2
    search.observe(100.0)
    assert search.propose() == 2


def test_first_steps_and_outliers_do_not_count():
    search, proposed = _search({1: [1, 5, 5, 5], 2: [50, 4, 60, 4]}, warm_up=1, steps=3)
    assert len(proposed) == 8
    assert search.chosen == 2


def test_a_tie_goes_to_fewer_chunks():
    assert _search({1: [2.0], 2: [2.0]}, warm_up=0, steps=1)[0].chosen == 1


def test_one_degree_needs_no_search():
    assert ChunkSearch((4,)).chosen == 4


def test_nothing_to_try():
    with pytest.raises(ValueError, match="degrees"):
        ChunkSearch(())
