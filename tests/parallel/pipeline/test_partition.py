"""The split of the layers over the stages is the best there is, and stays quick for the largest models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, combinations_with_replacement

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pentad.parallel.pipeline.partition import MOST_EVEN, as_even, partition
from pentad.parallel.pipeline.schedules import placement

Worth = tuple[float, float, float, float]


def _worth(counts: tuple[int, ...], costs: list[int], first: float, last: float, where: tuple[int, ...]) -> Worth:
    """Largest rank, largest stage, and the sums of squares of both, written out."""
    stages, taken = [], 0
    for count in counts:
        stages.append(float(sum(costs[taken : taken + count])))
        taken += count
    stages[0] += first
    stages[-1] += last
    ranks = [sum(s for s, r in zip(stages, where, strict=True) if r == rank) for rank in range(max(where) + 1)]
    return max(ranks), max(stages), sum(r * r for r in ranks), sum(s * s for s in stages)


def _splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """All there are."""
    cuts = combinations_with_replacement(range(layers + 1), stages - 1)
    return (tuple(b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)) for cut in cuts)


def _best(costs: list[int], first: float, last: float, where: tuple[int, ...]) -> Worth:
    return min(_worth(split, costs, first, last, where) for split in _splits(len(costs), len(where)))


_PLACEMENTS = st.sampled_from(
    [("1f1b", 1, 1), ("1f1b", 2, 1), ("1f1b", 5, 1), ("gis", 2, 2), ("gis", 3, 2), ("gis", 2, 3), ("gis", 1, 3)]
    + [("zb-v", p, 2) for p in (1, 2, 3)]
)
_COSTS = st.lists(st.integers(0, 9), max_size=8) | st.builds(lambda c, n: [c] * n, st.integers(0, 5), st.integers(0, 8))


@settings(max_examples=300, deadline=None)
@given(_COSTS, st.integers(0, 20), st.integers(0, 20), _PLACEMENTS)
@example([9, 5, 8, 8, 2, 0], 4, 0, ("gis", 3, 2))
@example([1, 4, 5, 1, 2, 5], 9, 9, ("gis", 3, 2))
@example([1] * 7, 0, 3, ("zb-v", 3, 2))
@example([1] * 7, 3, 3, ("gis", 3, 2))
def test_no_split_is_better(costs: list[int], first: int, last: int, size: tuple[str, int, int]) -> None:
    where = placement(*size)
    counts = partition(costs, len(where), first=first, last=last, placement=where)
    assert len(counts) == len(where) and sum(counts) == len(costs) and min(counts) >= 0
    assert _worth(counts, costs, first, last, where) == _best(costs, first, last, where)


@settings(max_examples=200, deadline=None)
@given(_COSTS, st.integers(0, 20), st.integers(0, 20), _PLACEMENTS)
@example([1] * 7, 0, 3, ("zb-v", 3, 2))
def test_all_that_are_as_good_are_found(costs: list[int], first: int, last: int, size: tuple[str, int, int]) -> None:
    where = placement(*size)
    counts = partition(costs, len(where), first=first, last=last, placement=where)
    found = as_even(costs, counts, first=first, last=last, placement=where)
    best = _worth(counts, costs, first, last, where)
    alike = {split for split in _splits(len(costs), len(where)) if _worth(split, costs, first, last, where) == best}
    assert found[0] == counts and len(set(found)) == len(found)
    assert set(found) == alike or (len(found) == MOST_EVEN and set(found) < alike)


def test_the_fuller_stages_can_be_any() -> None:
    assert set(as_even([2.0] * 8, (2, 3, 3), placement=range(3))) == {(2, 3, 3), (3, 2, 3), (3, 3, 2)}
    assert len(as_even([0.1] * 61, partition([0.1] * 61, 16, placement=range(16)), placement=range(16))) == MOST_EVEN


def test_equal_layers() -> None:
    assert partition([0.1] * 32, 8, placement=range(8)) == (4,) * 8
    # A head that costs as much as five layers leaves its stage none; early stages get fewer.
    assert partition([0.1] * 32, 8, last=0.5, placement=range(8)) == (4, 4, 4, 5, 5, 5, 5, 0)
    assert partition([1.0] * 3, 4, placement=range(4)) == (0, 1, 1, 1)
    assert partition([], 3, last=1.0, placement=range(3)) == (0, 0, 0)
    # Both ends of a V are on rank 0.
    assert partition([1.0] * 12, 4, last=4.0, placement=(0, 1, 1, 0)) == (4, 4, 4, 0)


def test_sizes_of_the_largest_models() -> None:
    costs = [1.0 + 0.1 * (i % 3) for i in range(130)]
    for name, ranks, chunks in (("1f1b", 64, 1), ("gis", 16, 4), ("zb-v", 32, 2)):
        where = placement(name, ranks, chunks)
        counts = partition(costs, len(where), last=5.3, placement=where)
        loads, sums = [0.0] * ranks, [0.0, *accumulate(costs)]
        for rank, count, end in zip(where, counts, accumulate(counts), strict=True):
            loads[rank] += sums[end] - sums[end - count]
        loads[where[-1]] += 5.3
        # Whoever has most could not give a layer away without somebody else having as much.
        assert sum(counts) == 130
        assert max(loads) <= max(5.3, sum(loads) / ranks + max(costs)) + 1e-9


@pytest.mark.parametrize(
    ("costs", "last", "where"), [([1.0, -1.0], 0.0, (0, 1)), ([1.0], float("nan"), (0, 1)), ([1.0], 0.0, (0,))]
)
def test_wrong_arguments(costs: list[float], last: float, where: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least"):
        partition(costs, 2, last=last, placement=where)
