"""Which rank holds the others up, why, and how sure that is. From the rows of `parts.py`; no torch.

A rank's *load* in a step is what makes the others wait for it: the time that it was busy itself, per unit of the work
that was given to it as far as time follows work (`peers.share_by_work`), and its waits for data, collections of garbage
and moving data. Loads are compared between ranks of the same role, over the medians of windows:

    score   the median of its peers over its own: 1 as fast as they are, 0.5 half as fast
    z       how far that lies outside what it scatters against its peers in the same steps anyway

Unlike with scores against the fastest rank (NVIDIA's resiliency extension), one lucky rank makes nobody slow; and a
rank that is slow because it was given more to do is an imbalance, for which no rank is to blame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from .links import Link, blamed_link, delay_matrix, slow_links
from .parts import AT, AXES, OWN, QUEUED, SECONDS, TimePart
from .peers import median_of_others, share_by_work

WINDOW = 20
"""Steps."""
_PERSISTS, _OF = 3, 4
"""In how many of so many windows a rank must be slow before it is called a straggler."""
_SLOW_SCORE, _SURE_Z = 0.93, 4.0
_STEADY_SCORE = 0.95
"""Of each of the last windows, where a rank is slow in all of them together and in none for sure."""
_MEDIAN_ERROR = 1.2533
"""Standard error of a median, in those of a mean."""
_MAD = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations."""


class Reason(StrEnum):
    """Why a rank is slow."""

    COMPUTE = "compute"
    """It computes more slowly, or is held up in between."""
    DATA = "data"
    """It waits for its loader."""
    NETWORK = "network"
    """Its data move more slowly, to or from one rank (`StragglerVerdict.peer`) or all."""
    IMBALANCE = "imbalance"
    """It has more to do."""
    GC = "gc"
    """Python collects garbage."""
    CONTENTION = "contention"
    """Its thread could run and did not get a core."""


@dataclass(frozen=True)
class StragglerVerdict:
    """What a window says of the slowest rank.

    Args:
        step: the window's last.
        rank: none where no rank is to blame (`Reason.IMBALANCE`).
        score: of that rank, or of the one with more to do.
        z: how sure.
        reason: none as long as the score is not `slow`.
        cost: by how much of themselves steps would be shorter without it.
        confirmed: it has been slow in three of four windows.
        scores: (ranks,) of all.
        peer: the rank at the other end, where a link between two is slow and neither of them.
    """

    step: int
    rank: int | None
    score: float
    z: float
    reason: Reason | None
    cost: float
    confirmed: bool
    scores: np.ndarray
    peer: int | None = None


@dataclass(frozen=True)
class _Window:
    """Medians over the steps of a window: (ranks,) each."""

    load: np.ndarray
    raw: np.ndarray
    scatter: np.ndarray
    seconds: float
    causes: Mapping[Reason, np.ndarray]
    lost: np.ndarray
    """In which the thread did not run."""
    links: Mapping[Link, float]
    """The delay matrix."""


class Stragglers:
    """Scores ranks, window by window.

    Args:
        roles: (ranks,) ranks with the same number do the same; who has no peer is compared with its own past.
        window: steps of a window.
    """

    def __init__(self, roles: Sequence[int], window: int = WINDOW) -> None:
        self._roles, self._window = np.asarray(roles), window
        self._alone = np.bincount(self._roles)[self._roles] == 1
        self._rows: list[np.ndarray] = []
        self._work: list[np.ndarray] = []
        self._past: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=_OF)
        """Scores and z of the last windows."""
        self._first: np.ndarray | None = None
        """Loads of the first window, of ranks that have no peer."""

    def step(self, number: int, rows: np.ndarray, work: np.ndarray) -> StragglerVerdict | None:
        """Takes a step; at the end of a window what it says.

        Args:
            number: of the step.
            rows: (ranks, numbers) of it.
            work: (ranks,) what each rank was given to do, over the mean of its role.
        """
        self._rows.append(rows)
        self._work.append(work)
        if len(self._rows) < self._window:
            return None
        rows, work = np.stack(self._rows), np.stack(self._work)
        self._rows.clear()
        self._work.clear()
        return self._judge(number, self._window_of(rows, work))

    def _window_of(self, rows: np.ndarray, work: np.ndarray) -> _Window:
        """The medians of (steps, ranks, numbers) and (steps, ranks)."""
        if (work == work[:, :1]).all():
            return _window(rows, work, self._roles)
        # What time follows work is learned from all ranks, and then again from those that are not in question.
        share = share_by_work(rows[..., OWN], work, self._roles)
        load, reference = self._compared(_window(rows, 1 + share * (work - 1), self._roles).load, keep=False)
        suspect = int(np.argmax(load / np.maximum(reference, 1e-12)))
        share = share_by_work(rows[..., OWN], work, self._roles, without=suspect)
        return _window(rows, 1 + share * (work - 1), self._roles)

    def _judge(self, number: int, window: _Window) -> StragglerVerdict:
        load, reference = self._compared(window.load)
        raw, raw_reference = self._compared(window.raw, keep=False)
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = np.nan_to_num(reference / load, nan=1.0)
            z = np.nan_to_num((load - reference) / self._error(window, load), nan=0.0)
            raw_scores = np.nan_to_num(raw_reference / raw, nan=1.0)
        self._past.append((scores, z))
        slow, confirmed = self._persistent()
        rank = int(np.argmin(np.where(confirmed, scores, scores + 2)) if confirmed.any() else np.argmin(scores))
        cost = self._cost(rank, window)
        if slow[rank] or confirmed[rank]:
            reason, peer, score, sure = self._reason(rank, window), None, float(scores[rank]), float(z[rank])
            ends = [rank]
            if reason == Reason.NETWORK:
                rank, peer = self._link(rank, window, slow)
                ends = [rank] if peer is None else [rank, peer]  # both suffer, in some windows one more than the other
                cost = self._cost(rank, window, peer)
            sure_of_it = bool(confirmed[ends].any())
            return StragglerVerdict(number, rank, score, sure, reason, cost, sure_of_it, scores, peer)
        heavy = int(np.argmin(raw_scores))
        if raw_scores[heavy] < _SLOW_SCORE and self._work_of(window)[heavy] > 1 / _SLOW_SCORE:
            score, cost = float(raw_scores[heavy]), self._cost(heavy, window)
            return StragglerVerdict(number, None, score, 0.0, Reason.IMBALANCE, cost, False, scores)
        return StragglerVerdict(number, rank, float(scores[rank]), float(z[rank]), None, 0.0, False, scores)

    def _persistent(self) -> tuple[np.ndarray, np.ndarray]:
        """(ranks,) who is slow in the newest window, and who was so in most of the last ones, or in all together where
        on a machine with other work one window alone does not tell."""
        scores, z = (np.stack(each) for each in zip(*self._past, strict=True))
        slow = (scores < _SLOW_SCORE) & (z > _SURE_Z)
        confirmed = (slow.sum(0) >= _PERSISTS) & slow[-1]
        if len(scores) == _OF:
            steady = (scores < _STEADY_SCORE).all(0) & (scores.mean(0) < _SLOW_SCORE)
            confirmed |= steady & (z.sum(0) / _OF**0.5 > _SURE_Z)
        return slow[-1], confirmed

    def _compared(self, load: np.ndarray, *, keep: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Loads, and what each is to be compared with: the median of its peers. Of ranks that have none, the load is
        taken over that of the first window, and compared with what became of all others meanwhile."""
        reference, found = np.ones(len(load)), load.copy()
        for role in np.unique(self._roles[~self._alone]):
            ranks = np.flatnonzero(self._roles == role)
            reference[ranks] = median_of_others(load[ranks])
        if self._alone.any() and keep:
            if self._first is None:
                self._first = load.copy()
            change = load / np.where(self._first > 0, self._first, 1.0)
            for rank in np.flatnonzero(self._alone):
                others = np.delete(change, rank)
                found[rank], reference[rank] = change[rank], np.median(others) if len(others) else 1.0
        elif self._alone.any():
            reference[self._alone] = load[self._alone]
        return found, reference

    def _error(self, window: _Window, load: np.ndarray) -> np.ndarray:
        """(ranks,) what the compared loads are uncertain by: the scatter of steps, and that of the peers' medians."""
        scale = np.divide(load, window.load, out=np.ones_like(load), where=window.load > 0)
        scatter = window.scatter * scale
        found = np.empty(len(load))
        for rank, role in enumerate(self._roles):
            ranks = np.flatnonzero(self._roles == role) if not self._alone[rank] else np.arange(len(load))
            others = ranks[ranks != rank]
            if not len(others):
                found[rank] = np.inf
                continue
            between = _MAD * np.median(np.abs(load[others] - np.median(load[others]))) if len(others) > 2 else 0.0
            steps = max(scatter[rank], float(np.median(scatter[others])))
            found[rank] = np.hypot(_MEDIAN_ERROR * steps / self._window**0.5, between)
        return np.maximum(found, 1e-9)

    def _reason(self, rank: int, window: _Window) -> Reason:
        """The cause in which the rank exceeds its peers most."""
        others = self._others(rank)
        excess = {reason: values[rank] - np.median(values[others]) for reason, values in window.causes.items()}
        # The kernel's count holds for the whole step, so only what its passes lost too is due to it.
        lost = window.lost[rank] - np.median(window.lost[others])
        excess[Reason.CONTENTION] = min(excess[Reason.CONTENTION], lost)
        excess[Reason.COMPUTE] -= max(excess[Reason.CONTENTION], 0.0)
        return max(excess, key=lambda reason: excess[reason])

    def _link(self, rank: int, window: _Window, slow: np.ndarray) -> tuple[int, int | None]:
        """Which rank to name for a slow network, and with a slow link its other end: in their order, so that they are
        the same in every window."""
        found = blamed_link(rank, slow_links(window.links, self._roles, window.seconds))
        if found is None:
            return rank, None
        first, second = found
        if second is None:
            return first if slow[first] else rank, None
        return min(first, second), max(first, second)

    def _others(self, rank: int) -> np.ndarray:
        same = self._roles == self._roles[rank] if not self._alone[rank] else np.ones(len(self._roles), bool)
        ranks = np.flatnonzero(same)
        return ranks[ranks != rank] if len(ranks) > 1 else ranks

    def _cost(self, rank: int, window: _Window, peer: int | None = None) -> float:
        """What the rank's raw load exceeds the next one of its role by, over the step; `peer` has the same trouble."""
        others = [other for other in self._others(rank) if other != peer]
        if self._alone[rank] or not window.seconds or not others:
            return 0.0
        return float(np.clip((window.raw[rank] - window.raw[others].max()) / window.seconds, 0, 1))

    def _work_of(self, window: _Window) -> np.ndarray:
        return np.divide(window.raw, window.load, out=np.ones_like(window.raw), where=window.load > 0)


def _window(rows: np.ndarray, work: np.ndarray, roles: np.ndarray) -> _Window:
    """The medians of (steps, ranks, numbers); `work` (steps, ranks): what the ranks' own time is divided by."""

    def of(part: TimePart) -> np.ndarray:
        return rows[..., AT[part]]

    network = sum(of(part) for part in AXES)
    beside = of(TimePart.DATA) + of(TimePart.GC) + network
    raw = rows[..., OWN] + beside
    load = rows[..., OWN] / np.where(work > 0, work, 1.0) + beside
    median = np.median(load, 0)
    causes = {
        Reason.COMPUTE: rows[..., OWN],
        Reason.CONTENTION: rows[..., QUEUED],
        Reason.DATA: of(TimePart.DATA),
        Reason.GC: of(TimePart.GC),
        Reason.NETWORK: network,
    }
    return _Window(
        load=median,
        raw=np.median(raw, 0),
        scatter=_scatter(load, roles),
        seconds=float(np.median(rows[..., SECONDS].mean(1))),
        causes={
            reason: np.mean(values, 0) if reason == Reason.GC else np.median(values, 0)
            for reason, values in causes.items()
        },
        lost=np.median(of(TimePart.CONTENTION), 0),
        links=delay_matrix(rows),
    )


def _scatter(load: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """(ranks,) what the loads (steps, ranks) scatter against those of their peers in the same step: what slows all of
    them in a step says nothing about any. Of a rank without peers, against the others, each over its own median."""
    usual = np.median(load, 0)
    against = load - usual
    if load.shape[1] > 1:
        relative = load / np.where(usual > 0, usual, 1.0)
        against = (relative - median_of_others(relative)) * usual
    for role in np.unique(roles):
        ranks = np.flatnonzero(roles == role)
        if len(ranks) > 1:
            against[:, ranks] = load[:, ranks] - median_of_others(load[:, ranks])
    return _MAD * np.median(np.abs(against - np.median(against, 0)), 0)
