"""Steps whose loss or gradient is far above those before: docs/numerics.md."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..formats import numbers
from ..metric import Alert, Metric
from .protocol import Reading, RunFacts, StepDone

_WINDOW, _WARM_UP = 50, 20
"""Steps that a value is compared with, and how many there must be."""
_FACTOR, _DEVIATIONS = 5.0, 10.0
"""A spike is above so many times the moving average, and so many median deviations above the median."""
_SMOOTHING = 0.9
_LEVEL = 5
"""Spikes in a row after which their values are the new level."""
_SHOWN = 3
"""Microbatches that are named."""


class SpikeFinder:
    """Finds spikes in one quantity.

    A value is a spike if it is above max(5 × moving average, median + 10 × median absolute deviation) of the last
    50 values that were none. A loss is the logarithm of a perplexity, and it is the perplexity that is 5 times as high.

    Args:
        log: whether the quantity is a logarithm: then a factor is a difference.
    """

    def __init__(self, *, log: bool) -> None:
        self._log = log
        self._window: deque[float] = deque(maxlen=_WINDOW)
        self._average = math.nan
        self._row: list[float] = []

    @property
    def expected(self) -> float:
        """The moving average."""
        return self._average

    @property
    def limit(self) -> float:
        """Above which the next value is a spike; infinite until there are enough."""
        if len(self._window) < _WARM_UP:
            return math.inf
        values = np.array(self._window)
        median = float(np.median(values))
        return max(self._high, median + _DEVIATIONS * float(np.median(np.abs(values - median))))

    @property
    def _high(self) -> float:
        return self._average + math.log(_FACTOR) if self._log else self._average * _FACTOR

    def step(self, value: float) -> tuple[float, float] | None:
        """What was expected and what the limit is, if the value is a spike."""
        if not math.isfinite(value):
            return None
        found = self._exceeded(value) if len(self._window) >= _WARM_UP else None
        if found is not None:
            self._row.append(value)
            if len(self._row) >= _LEVEL:
                self._restart()
            return found
        self._row.clear()
        self._keep(value)
        return None

    def _exceeded(self, value: float) -> tuple[float, float] | None:
        if value <= self._high:  # as nearly always: medians cost more than all else here
            return None
        limit = self.limit
        return (self._average, limit) if value > limit else None

    def _keep(self, value: float) -> None:
        self._window.append(value)
        first = math.isnan(self._average)
        self._average = value if first else _SMOOTHING * self._average + (1 - _SMOOTHING) * value

    def _restart(self) -> None:
        values, self._row = self._row, []
        self._window.clear()
        self._average = math.nan
        for value in values:
            self._keep(value)


def spike_finders() -> dict[str, SpikeFinder]:
    """For the loss and the gradient's norm, by name."""
    return {"loss": SpikeFinder(log=True), "grad_norm": SpikeFinder(log=False)}


def spike_words(found: Mapping[str, tuple[float, float, float]]) -> str:
    """For people: what was found of which quantity; value, what was expected, limit."""
    each = (
        f"{_NAMES[name]} {value:.4g} where {expected:.4g} was expected" for name, (value, expected, _) in found.items()
    )
    return f"spike: {' and '.join(each)}"


class SpikeReading(Reading):
    """An alert for a step whose loss or gradient norm is a spike, with the sequences of its batch."""

    metrics = (
        Metric(
            "spike_alert",
            "a message, and an event, when loss or gradient norm is far above the steps before",
            in_file=False,
            tracker="spike/alert",
            line=lambda _, alert: alert.text,
        ),
    )

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        self._finders = spike_finders()

    def step(self, done: StepDone) -> Mapping[str, Any]:
        numerics = self.run.cfg.faults.numerics
        if done.spike is not None:
            return {"spike_alert": self._alert(done, done.spike.found)}
        if not numerics.spikes or numerics.on_spike != "tell" or done.skipped:
            return {}
        values = {"loss": done.loss, "grad_norm": done.grad_norm}
        found = {what: limits for what, value in values.items() if (limits := self._finders[what].step(value))}
        if not found:
            return {}
        return {"spike_alert": self._alert(done, {what: (values[what], *limits) for what, limits in found.items()})}

    def _alert(self, done: StepDone, found: Mapping[str, tuple[float, float, float]]) -> Alert:
        batch = self.run.cfg.train.global_batch
        first = (done.step - 1) * batch
        worst = self._worst(done, first)
        text = f"{spike_words(found)}; samples {first}-{first + batch - 1}"
        if worst:
            text += f", most of it in {numbers(worst[0]['samples'])} (microbatch {worst[0]['microbatch']})"
        if done.spike is not None:
            text += f"; {done.spike.text}"
        fields = {
            "step": done.step,
            **{
                name: {"value": value, "expected": expected, "limit": limit}
                for name, (value, expected, limit) in found.items()
            },
            "samples": [first, first + batch - 1],
            "microbatches": worst,
            **({} if done.spike is None else done.spike.fields),
        }
        return Alert("spike", text, "spike", fields)

    def _worst(self, done: StepDone, first: int) -> list[dict[str, Any]]:
        """The microbatches that add most to the loss, where that is known."""
        size, dp = self.run.cfg.train.micro_batch, self.run.cfg.parallel.dp or 1
        order = np.argsort(np.array(done.losses))[::-1][:_SHOWN].tolist()
        found = []
        for number in order:
            samples = list(range(first + number * size, first + (number + 1) * size))
            # What it adds is its share of the mean over all tokens: as many times that as there are microbatches.
            mean = done.losses[number] * len(done.losses)
            found.append({"microbatch": number, "dp_rank": number % dp, "loss": mean, "samples": samples})
            if self.run.locate is not None:
                found[-1]["places"] = [list(place) for place in self.run.locate(samples)]
        return found


_NAMES = {"loss": "loss", "grad_norm": "gradient norm"}
