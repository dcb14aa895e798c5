"""All readings of a run: pentad's own, and those that somebody else's modules register. No torch here."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ....configs.errors import UserError
from ..evaluation import HELD_OUT_LOSS
from ..metric import Metric
from ..notices import warn
from ..report import Report, Shown
from .memory import MemoryReading
from .progress import ProgressReading
from .protocol import OnRank, Reading, RunFacts, StepDone
from .routing import RoutingReading
from .speed import SpeedReading
from .spikes import SpikeReading
from .straggler import StragglerReading
from .utilization import UtilizationReading
from .waterfall import WaterfallReading

BUILT_IN: tuple[type[Reading], ...] = (
    ProgressReading,
    SpeedReading,
    UtilizationReading,
    MemoryReading,
    WaterfallReading,
    StragglerReading,
    SpikeReading,
    RoutingReading,
)
_registered: list[type[Reading]] = []


def register(reading: type[Reading]) -> type[Reading]:
    """Adds a reading to every run that this process starts from now on; a decorator.

    Raises:
        UserError: one of its metrics has the key, or the trackers' key, of another metric.
    """
    if reading not in _registered:
        problems = [*_clashes("key", reading), *_clashes("tracker", reading)]
        if problems:
            raise UserError(*problems)
        _registered.append(reading)
    return reading


def _clashes(field: str, reading: type[Reading]) -> list[str]:
    """A line for each metric that has the same `field` as another one."""
    owners = {getattr(HELD_OUT_LOSS, field): "the evaluation"}
    owners |= {getattr(m, field): _name(kind) for kind in (*BUILT_IN, *_registered) for m in kind.metrics}
    problems = []
    for metric in reading.metrics:
        name = getattr(metric, field)
        if name is not None and name in owners:
            problems.append(f"reading {_name(reading)}: {field} {name!r} is that of {owners[name]}; give another one")
        owners[name] = "another metric of the same reading"
    return problems


def _name(kind: type[Reading]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass
class _Kept:
    """A reading as long as it has not failed."""

    kind: type[Reading]
    metrics: tuple[Metric, ...]
    reading: Reading | None = None


class Readings:
    """The readings of one run.

    One of somebody else's that raises is warned of and left out from then on: its values are unknown. One of pentad's
    own that raises is an error like any other.

    Args:
        run: the run that is read.
        kinds: none: pentad's own and the registered ones.
    """

    def __init__(self, run: RunFacts, kinds: Iterable[type[Reading]] | None = None) -> None:
        self._kept = [_Kept(kind, kind.metrics) for kind in ((*BUILT_IN, *_registered) if kinds is None else kinds)]
        for kept in self._kept:
            with _spared(kept):
                kept.reading = kept.kind(run)
                kept.metrics = kept.reading.metrics

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Of all readings."""
        return tuple(metric for kept in self._kept for metric in kept.metrics)

    @property
    def watched(self) -> int:
        """How many numbers `watch` returns."""
        return sum(kept.kind.watched for kept in self._kept)

    def watch(self, mine: OnRank) -> list[float]:
        """The numbers of this rank whose largest over all ranks `step` wants: as many on every rank."""
        found: list[float] = []
        for kept in self._kept:
            numbers = [-float("inf")] * kept.kind.watched  # of a rank that cannot tell
            if kept.reading is not None and numbers:
                with _spared(kept):
                    numbers = _as_many(numbers, kept.reading.watch(mine))
            found += numbers
        return found

    def step(self, done: StepDone, worst: Sequence[float]) -> Report:
        """The values of all metrics.

        Args:
            done: the step.
            worst: for each number of `watch` the largest over all ranks.
        """
        shown: list[Shown] = []
        rest = tuple(worst)
        for kept in self._kept:
            count = kept.kind.watched
            shown += _shown(kept, replace(done, worst=rest[:count]))
            rest = rest[count:]
        return Report(done.step, tuple(shown), done.skipped)

    def close(self) -> None:
        """Closes every reading."""
        for kept in self._kept:
            if kept.reading is not None:
                with _spared(kept):
                    kept.reading.close()


def _as_many(expected: Sequence[float], found: Sequence[float]) -> list[float]:
    numbers = [float(number) for number in found]
    if len(numbers) != len(expected):
        raise ValueError(f"watch returned {len(numbers)} numbers, watched={len(expected)}")
    return numbers


def _shown(kept: _Kept, done: StepDone) -> list[Shown]:
    if kept.reading is not None:
        with _spared(kept):
            values = kept.reading.step(done)
            unknown = set(values) - {metric.key for metric in kept.metrics}
            if unknown:
                raise ValueError(f"step returned {sorted(unknown)}, of which metrics says nothing")
            # What a metric itself brings to show a value by is somebody else's too.
            return [Shown.of(metric, values.get(metric.key), done.step) for metric in kept.metrics]
    return [Shown.of(metric, None, done.step) for metric in kept.metrics]


@contextmanager
def _spared(kept: _Kept) -> Generator[None, None, None]:
    """The run goes on where a reading that is not pentad's own fails."""
    try:
        yield
    except Exception as error:
        if kept.kind in BUILT_IN:
            raise
        kept.reading = None
        warn(f"reading {_name(kept.kind)} failed and is left out from now on: {type(error).__name__}: {error}")
