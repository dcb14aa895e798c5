"""Which sample comes when, as pure functions of (seed, position): nothing to save, so resuming needs no data state.

Position g of a run is `step * global_batch + sequence`. A blend maps g to (source, position in that source) by a
periodic pattern; a source maps its position to (epoch, index), the epoch's permutation maps the index to a training
sample, and one fixed permutation separates training from held-out windows. Every map is random access.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from ...configs.errors import Problem, UserError

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6
MAX_PERIOD = 1 << 16


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Images [n] of `index` [n] (ints in [0, size)) under the pseudo-random permutation of [0, size) named by key.

    A balanced Feistel network over the smallest even number of bits that holds `size`, iterated until the image
    falls below `size` (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). No memory
    beyond the arguments; fewer than 4 expected iterations. The round function is the finaliser of SplitMix64.
    """
    if size <= 1:
        return np.zeros(len(index), np.int64)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    out = index.astype(np.uint64)
    pending = np.arange(len(out))
    while pending.size:
        image = _feistel(out[pending], half, keys)
        out[pending] = image
        pending = pending[image >= size]
    return out.astype(np.int64)


def _feistel(value: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@lru_cache(64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix((state ^ np.uint64(part & _WORD)) + np.uint64(_GOLDEN))
    steps = np.array([(_GOLDEN * (i + 1)) & _WORD for i in range(_ROUNDS)], np.uint64)
    return _mix(state + steps)


@dataclass(frozen=True)
class Pattern:
    """A repeating order of sources: `sources` [period] of each position, `before` [period] the number of earlier
    positions of the same source in the period, `counts` [sources] the number of positions of each in a period."""

    sources: np.ndarray
    before: np.ndarray
    counts: np.ndarray

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [n] and position within that source [n] of run positions [n]."""
        period, at = np.divmod(position, len(self.sources))
        source = self.sources[at]
        return source, period * self.counts[source] + self.before[at]

    def turns(self, positions: int) -> np.ndarray:
        """How many of the first `positions` positions each source [sources] has."""
        periods, rest = divmod(positions, len(self.sources))
        return periods * self.counts + np.bincount(self.sources[:rest], minlength=len(self.counts))


def make_pattern(weights: Sequence[float], key: str = "data.weights") -> Pattern:
    """The order in which sources with these weights take turns.

    In every prefix of n positions source s has floor(w_s n) or ceil(w_s n) of them (w_s: its share), so the error is
    below one. The i-th turn of s has the window [floor(i / w_s), ceil((i + 1) / w_s)), and earliest deadline first
    meets every window (Baruah et al. 1996, "Proportionate progress"). Shares whose common denominator is at most
    65536 are exact (the weights as written: 0.7 is 7/10); others are rounded to multiples of 1/65536, none to zero.
    Raises UserError for no weights, or one that is not a positive number.
    """
    if not weights:
        raise UserError(Problem(key, "no sources; give at least one prefix and its weight"))
    bad = [w for w in weights if not (math.isfinite(w) and w > 0)]
    if bad:
        raise UserError(*(Problem(key, f"weight {w} is not a positive number") for w in bad))
    counts = _turns(weights)
    period = sum(counts)
    ready: list[tuple[int, int, int]] = []
    waiting = [(0, s, 0) for s in range(len(counts))]
    order = np.empty(period, np.int64)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, s, turn = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(turn + 1) * period // counts[s]), s, turn))
        _, s, turn = heapq.heappop(ready)
        order[slot] = s
        if turn + 1 < counts[s]:
            heapq.heappush(waiting, ((turn + 1) * period // counts[s], s, turn + 1))
    return _pattern(order, len(counts))


def _pattern(order: np.ndarray, sources: int) -> Pattern:
    counts = np.bincount(order, minlength=sources)
    before = np.empty(len(order), np.int64)
    for s, count in enumerate(counts):
        before[order == s] = np.arange(count)
    return Pattern(order, before, counts)


@dataclass(frozen=True)
class _Stretch:
    """Held-out positions from `start` on, as long as the same sources have windows left: their order, and how many
    windows each source [sources] has given before."""

    start: int
    pattern: Pattern
    given: np.ndarray


def _turns(weights: Sequence[float]) -> list[int]:
    """Integer turns per period of each source, in the ratio of the weights."""
    exact = [Fraction(repr(float(w))) for w in weights]
    shares = [w / sum(exact) for w in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [max(1, int(share * MAX_PERIOD)) for share in shares]
    # Largest remainders take what rounding down left over; the largest sources pay for those lifted to one turn.
    by_remainder = sorted(range(len(shares)), key=lambda s: counts[s] - shares[s] * MAX_PERIOD)
    for s in by_remainder[: max(0, MAX_PERIOD - sum(counts))]:
        counts[s] += 1
    while sum(counts) > MAX_PERIOD:
        counts[counts.index(max(counts))] -= 1
    return counts


@dataclass(frozen=True)
class Sampler:
    """Maps positions of a run to windows of sources.

    `windows` and `heldout` give, per source, the number of all windows and of those held out; `evaluate`
    selects the held-out ones, which come in one fixed order whatever the seed, each once before any comes again: a
    source that has given all of its own is passed over, so that no small source is read over and over.
    """

    windows: tuple[int, ...]
    heldout: tuple[int, ...]
    pattern: Pattern
    seed: int
    evaluate: bool = False

    def index(self, step: int, sequence: int, global_batch: int) -> tuple[int, int]:
        """(source, window) of one sequence of a step's global batch."""
        source, window = self.locate(np.array([step * global_batch + sequence]))
        return int(source[0]), int(window[0])

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [n] and window [n] of run positions [n]."""
        source, turn = self._heldout_turns(position) if self.evaluate else self.pattern.locate(position)
        window = np.empty_like(turn)
        for s in np.unique(source):
            at = source == s
            window[at] = self._window(int(s), turn[at])
        return source, window

    def _heldout_turns(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position = position % sum(self.heldout)
        stretches = self._stretches
        number = np.searchsorted([stretch.start for stretch in stretches], position, "right") - 1
        source, turn = np.empty_like(position), np.empty_like(position)
        for n in np.unique(number):
            at, stretch = number == n, stretches[n]
            source[at], turn[at] = stretch.pattern.locate(position[at] - stretch.start)
            turn[at] += stretch.given[source[at]]
        return source, turn

    @cached_property
    def _stretches(self) -> tuple[_Stretch, ...]:
        """The held-out order: the blend's, without the sources that have no windows left."""
        held, given = np.array(self.heldout), np.zeros(len(self.heldout), np.int64)
        found: list[_Stretch] = []
        start = 0
        while (given < held).any():
            order = self.pattern.sources[(given < held)[self.pattern.sources]]
            found.append(_Stretch(start, _pattern(order, len(held)), given))
            stop = _first_exhausted(found[-1].pattern, held - given)
            given, start = given + found[-1].pattern.turns(stop), start + stop
        return tuple(found)

    def _window(self, source: int, turn: np.ndarray) -> np.ndarray:
        total, held = self.windows[source], self.heldout[source]
        if self.evaluate:
            rank = turn
        else:
            epoch, index = np.divmod(turn, total - held)
            rank = np.empty_like(turn)
            for e in np.unique(epoch):
                at = epoch == e
                rank[at] = held + permute(index[at], total - held, (self.seed, source, int(e)))
        # The split has a key of its own, without the seed: runs with other seeds are evaluated on the same windows.
        return permute(rank, total, (0x686F6C64, source))


def _first_exhausted(pattern: Pattern, left: np.ndarray) -> int:
    """Positions until a source of `pattern` has given all of its `left` [sources] windows."""
    # The last window of source s is its turn left[s] - 1: `before` says where in a period that is.
    periods, turn = np.divmod(left[pattern.sources] - 1, np.maximum(pattern.counts, 1)[pattern.sources])
    ends = periods * len(pattern.sources) + np.arange(len(pattern.sources))
    return int(ends[pattern.before == turn].min()) + 1
