"""The number of chunks with which steps are fastest, found by trial."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


class ChunkSearch:
    """Tries each number of chunks for some steps, then stays with the fastest.

    Every rank makes the same choice as long as every rank is told the same times.

    Args:
        degrees: numbers of chunks to try.
        warm_up: first steps with each that do not count.
        steps: steps with each that count, by their median.
    """

    def __init__(self, degrees: Sequence[int] = (1, 2, 4), *, warm_up: int = 1, steps: int = 3) -> None:
        if not degrees or steps < 1:
            raise ValueError(f"a search needs degrees and steps, got {list(degrees)} and {steps}")
        self.degrees, self.warm_up, self.steps = tuple(degrees), warm_up, steps
        self.chosen: int | None = degrees[0] if len(degrees) == 1 else None
        """The answer; none while the search goes on."""
        self._times: list[list[float]] = []

    def propose(self) -> int:
        """The number of chunks for the next step."""
        if self.chosen is not None:
            return self.chosen
        return self.degrees[self._at()]

    def observe(self, seconds: float) -> None:
        """How long the step with the proposed number took, on the slowest rank."""
        if self.chosen is not None:
            return
        at = self._at()
        if at == len(self._times):
            self._times.append([])
        self._times[at].append(seconds)
        if self._at() == len(self.degrees):
            typical = [median(times[self.warm_up :]) for times in self._times]
            self.chosen = self.degrees[typical.index(min(typical))]

    def _at(self) -> int:
        full = self.warm_up + self.steps
        return sum(len(times) == full for times in self._times)
