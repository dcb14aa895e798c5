"""Permutations, blend proportions and the split, against definitions written out."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad.configs.errors import UserError
from pentad.trainer.data.sampler import MAX_PERIOD, Sampler, make_pattern, permute


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5000), st.integers(-(2**63), 2**64), st.integers(0, 10**6))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(size), size, (seed, epoch))
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**50), st.data())
def test_permute_needs_only_the_asked_indices(size: int, data: st.DataObject) -> None:
    some = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    image = permute(some, size, (3,))
    assert ((image >= 0) & (image < size)).all()
    assert [int(permute(some[i : i + 1], size, (3,))[0]) for i in range(len(some))] == image.tolist()


def test_permute_mixes_well() -> None:
    size, draws = 100, 3000
    first = np.array([permute(np.arange(3), size, (0, epoch)) for epoch in range(draws)])
    for place in range(3):
        counts = np.bincount(first[:, place], minlength=size)
        # Chi-squared with 99 degrees of freedom: mean 99, standard deviation 14; 170 is five of them away.
        assert ((counts - draws / size) ** 2 / (draws / size)).sum() < 170
    correlation = np.corrcoef(permute(np.arange(10000), 10000, (1, 0)), np.arange(10000))[0, 1]
    assert abs(correlation) < 0.05


def positions(sampler: Sampler, start: int, stop: int) -> list[tuple[int, int]]:
    source, window = sampler.locate(np.arange(start, stop))
    return list(zip(source.tolist(), window.tolist(), strict=True))


def test_every_epoch_is_each_training_window_once_in_a_new_order() -> None:
    sampler = Sampler((50,), (5,), make_pattern([1]), seed=7)
    epochs = [[window for _, window in positions(sampler, 45 * e, 45 * e + 45)] for e in range(3)]
    held = {w for _, w in positions(Sampler((50,), (5,), make_pattern([1]), 7, evaluate=True), 0, 5)}
    assert len(held) == 5
    for epoch in epochs:
        assert sorted(epoch) == sorted(set(range(50)) - held)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seed_changes_the_order_but_not_the_split() -> None:
    one, two = (Sampler((50,), (5,), make_pattern([1]), seed) for seed in (1, 2))
    assert positions(one, 0, 45) != positions(two, 0, 45)
    assert set(positions(one, 0, 45)) == set(positions(two, 0, 45))


def test_a_batch_across_epochs_and_single_lookups_agree() -> None:
    sampler = Sampler((11, 7), (1, 2), make_pattern([0.6, 0.4]), seed=3)
    whole = positions(sampler, 0, 60)
    assert [sampler.index(step, s, 4) for step in range(15) for s in range(4)] == whole
    assert list(chain(*(positions(sampler, i, i + 7) for i in range(0, 56, 7)))) == whole[:56]


WEIGHTS = [[1], [0.7, 0.2, 0.1], [5, 3, 2, 2, 1], [1, 1, 1], [1e-3, 0.999], [1, 2, 4, 8, 16, 32, 64, 128], [0.3] * 10]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_of_a_blend_is_within_one_of_its_shares(weights: list[float]) -> None:
    pattern = make_pattern(weights)
    exact = [Fraction(repr(float(w))) for w in weights]
    length = 3 * len(pattern.sources) + 5
    source, turn = pattern.locate(np.arange(length))
    for s, w in enumerate(exact):
        realised = np.cumsum(source == s)
        wanted = np.arange(1, length + 1) * (w.numerator / w.denominator / float(sum(exact)))
        assert np.abs(realised - wanted).max() < 1
        assert turn[source == s].tolist() == list(range(int(realised[-1])))


def test_weights_without_a_small_denominator_are_rounded_finely() -> None:
    weights = [np.pi, np.e, np.sqrt(2), 1e-9]
    pattern = make_pattern(weights)
    assert pattern.counts.sum() == MAX_PERIOD
    assert pattern.counts[3] == 1
    error = pattern.counts / MAX_PERIOD - np.array(weights) / sum(weights)
    assert np.abs(error).max() <= 2 / MAX_PERIOD


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0], [float("nan")], [float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"data.weights"):
        make_pattern(weights)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=5))
def test_held_out_windows_come_once_each_by_weight_and_small_sources_are_passed_over(
    sources: list[tuple[int, int]],
) -> None:
    pattern = make_pattern([weight for weight, _ in sources])
    held = tuple(count for _, count in sources)
    total = sum(held)
    sampler = Sampler(tuple(3 * count for count in held), held, pattern, seed=1, evaluate=True)
    found = positions(sampler, 0, total)
    assert len(set(found)) == total
    assert positions(sampler, total, 2 * total) == found
    wanted: list[tuple[int, int]] = []
    given, order, place = [0] * len(held), pattern.sources.tolist(), 0
    while order:
        s = order[place % len(order)]
        wanted.append((s, given[s]))
        given[s] += 1
        place += 1
        if given[s] == held[s]:
            order, place = [other for other in order if other != s], 0
    train = set(positions(dataclasses.replace(sampler, evaluate=False), 0, 500))
    assert not train & set(found)
    ranks = {s: [w for source, w in found if source == s] for s in range(len(held))}
    assert [(s, ranks[s].index(w)) for s, w in found] == wanted


def test_a_blend_is_evaluated_by_weight_while_each_source_lasts() -> None:
    weights, held = [0.5, 0.3, 0.2], (1, 30, 40)
    sampler = Sampler((100, 300, 400), held, make_pattern(weights), seed=0, evaluate=True)
    source = np.array([s for s, _ in positions(sampler, 0, sum(held))])
    assert (source == 0).sum() == 1
    # Behind the only window of the first source, the others go on in the ratio of their weights, 3 to 2.
    behind = source[np.argmax(source == 0) + 1 :][:40]
    assert abs((behind == 1).mean() - 0.6) < 0.05
