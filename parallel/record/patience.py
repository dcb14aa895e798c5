"""How long a rank may be without progress: never one number, but what its own phases take."""

from __future__ import annotations

import math

_FACTOR = 5.0
_SHARE = 0.99
_LEAST_S, _STEP = 0.02, 1.25
"""Pauses are counted in classes that grow by a quarter, from 20 ms on."""
_ENOUGH = 20
"""Pauses of a phase before they say anything."""


class Patience:
    """The limits of one rank: max(floor of the phase, 5 times what 99 % of its pauses took).

    Args:
        alive_s: without a sign of life.
        hang_s: without progress in a step, or its data.
        pause_s: the same in any other phase, but at the start and while loading: opening a corpus may take hours, and
            who waits there for another rank has a limit of its own.
    """

    def __init__(self, alive_s: float, hang_s: float, pause_s: float) -> None:
        self._floors = {"alive": alive_s, "step": hang_s, "data": hang_s, "start": math.inf, "load": math.inf}
        self._other = pause_s
        self._counts: dict[str, dict[int, int]] = {}

    def took(self, phase: str, seconds: float) -> None:
        """A pause that ended."""
        place = max(0, math.ceil(math.log(max(seconds, 1e-9) / _LEAST_S, _STEP)))
        counts = self._counts.setdefault(phase, {})
        counts[place] = counts.get(place, 0) + 1

    def limit(self, phase: str) -> float:
        """Seconds, of "alive" or of a phase."""
        return max(self._floors.get(phase, self._other), _FACTOR * self._usual(phase))

    def _usual(self, phase: str) -> float:
        counts = self._counts.get(phase, {})
        total = sum(counts.values())
        if total < _ENOUGH:
            return 0.0
        left = total * (1 - _SHARE)
        for place in sorted(counts, reverse=True):
            left -= counts[place]
            if left < 0:
                return _LEAST_S * _STEP**place
        return 0.0
