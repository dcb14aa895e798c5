"""Covering sets: few cases in which every pair of settings of a grid still meets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
_CANDIDATES = 200


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool], *, seed: int) -> list[Case]:
    """Cases of the grid `factors` in which every pair of values that occurs in an allowed case occurs at least once.

    Each next case is the best of some random ones that hold the first pair still missing. Deterministic by seed.
    """
    draws = random.Random(seed)
    names = list(factors)
    missing: dict[tuple, None] = {}
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(factors[a], factors[b]):
            missing[(a, x, b, y)] = None
    cases = []
    while missing:
        a, x, b, y = next(iter(missing))
        found = []
        for _ in range(_CANDIDATES):
            case = {name: draws.choice(list(values)) for name, values in factors.items()} | {a: x, b: y}
            if allowed(case):
                found.append(case)
        if not found:  # these two never meet
            del missing[(a, x, b, y)]
            continue
        best = max(found, key=lambda case: sum(pair in missing for pair in _pairs(case, names)))
        for pair in _pairs(best, names):
            missing.pop(pair, None)
        cases.append(best)
    return cases


def _pairs(case: Case, names: list[str]) -> list[tuple]:
    return [(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)]
