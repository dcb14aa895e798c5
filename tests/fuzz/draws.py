"""Random choices with weights, reproducible from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Keys = dict[str, Any]
"""Config keys with their values, by dotted name."""


class Draws(random.Random):
    """Python's generator, with the choices that the fuzzer makes."""

    def maybe(self, probability: float) -> bool:
        """True so often."""
        return self.random() < probability

    def pick(self, weights: Mapping[T, float]) -> T:
        """One of the keys, as often as its weight says."""
        return self.choices(list(weights), list(weights.values()))[0]

    def parts(self, total: int, count: int) -> list[int]:
        """`count` numbers of at least 0 that sum to `total`; every one is as likely to be empty."""
        parts = [0] * count
        for _ in range(total):
            parts[self.randrange(count)] += 1
        return parts

    def factors(self, product: int, names: Mapping[str, float]) -> dict[str, int]:
        """A number for each name, whose product is `product`; prime factors fall to names as often as weights say."""
        found = dict.fromkeys(names, 1)
        for prime in _primes(product):
            found[self.pick(names)] *= prime
        return found

    def divisor(self, *numbers: int) -> int:
        """A common divisor of the numbers."""
        return self.choice(common_divisors(*numbers))


def common_divisors(*numbers: int) -> Sequence[int]:
    """In ascending order."""
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def _primes(number: int) -> list[int]:
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found
