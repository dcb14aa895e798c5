"""Sums of words have the same bits in any order, and the value of the exact sum."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from pentad.parallel.kernels.exact_sums import add_words, from_words, words_of_squares, words_of_sum


def _gradients(count: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """(count, elements): of sizes from 1e-12 to 1e3, so that no order of adding would round alike."""
    draws = torch.Generator().manual_seed(3)
    scale = 10.0 ** (15 * torch.rand(count, elements, generator=draws, dtype=torch.float64) - 12)
    return (torch.randn(count, elements, generator=draws, dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_add_up_to_the_same_bits_in_any_order_and_in_any_parts(dtype: torch.dtype) -> None:
    gradients = _gradients(24, 50, dtype)
    found, plain = set[bytes](), set[bytes]()
    for seed, parts in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 6), (5, 24)):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        ranks = [torch.zeros(50, 2, dtype=torch.float64) for _ in range(parts)]
        sums = [torch.zeros(50, dtype=dtype) for _ in range(parts)]
        for place, index in enumerate(order.tolist()):
            add_words(ranks[place % parts], gradients[index])
            sums[place % parts] += gradients[index]
        found.add(from_words(torch.stack(ranks).sum(0)).numpy().tobytes())
        plain.add(torch.stack(sums).sum(0).numpy().tobytes())
    assert len(found) == 1 and len(plain) > 1
    total = torch.frombuffer(bytearray(found.pop()), dtype=torch.float64)
    for element in range(50):
        exact = sum((Fraction(value) for value in gradients[:, element].tolist()), Fraction(0))
        assert abs(Fraction(total[element].item()) - exact) <= abs(exact) * Fraction(2) ** -53 + 24 * Fraction(2) ** -73


def test_scalars_are_sums_of_all_elements_whatever_the_shards() -> None:
    gradient = _gradients(1, 3000, torch.float32)[0]
    exact = sum((Fraction(value) ** 2 for value in gradient.tolist()), Fraction(0))
    found = set[float]()
    for cuts in ([3000], [1000, 2000], [16, 1024, 1960], [1] * 3000):
        found.add(
            from_words(sum(map(words_of_squares, gradient.split(cuts)), torch.zeros(8, dtype=torch.float64))).item()
        )
    assert len(found) == 1 and abs(Fraction(found.pop()) / exact - 1) < Fraction(2) ** -50
    losses = _gradients(1, 40, torch.float32)[0]
    exact = sum((Fraction(value) for value in losses.tolist()), Fraction(0))
    assert from_words(words_of_sum(losses)).item() == pytest.approx(float(exact), rel=1e-15)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    words = torch.zeros(3, 2, dtype=torch.float64)
    add_words(words, torch.tensor([1.0, value, 2.0]))
    assert torch.isfinite(from_words(words)).tolist() == [True, False, True]
    assert not torch.isfinite(from_words(words_of_squares(torch.tensor([1.0, value]))))
