"""Where the time of a step went, and so why its MFU is not higher: docs/observability.md."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ....models.costs.flops import flops_per_step
from ....parallel.record.parts import AT, AXES, BLIND, SECONDS, TIME_PARTS, TimePart
from ....parallel.record.planned import measured_times, planned_idle
from ..metric import Metric
from ..rows import StepRows
from .protocol import Reading, RunFacts, StepDone
from .roles import lines

_REMEMBERED = 32
"""Steps whose rows may still come."""
_DIGITS = 6
"""After the point."""
_KEYS = tuple(part.value for part in TIME_PARTS)
_BUBBLE, _COMPUTE = TimePart.BUBBLE.value, TimePart.COMPUTE.value
_SHOWN_FROM = 0.005
"""Smaller parts are not on the console."""
_SIMULATING = 0.005
"""Share of the time that may go into simulating the program."""

MODEL, BELOW, PLANNED, UNPLANNED = "model", "below_ceiling", "bubble_planned", "bubble_unplanned"
ORDER = (
    MODEL, BELOW, *(part.value for part in (TimePart.COMPUTE, TimePart.RECOMPUTE)), PLANNED, UNPLANNED,
    *(part.value for part in TIME_PARTS if part not in (TimePart.COMPUTE, TimePart.RECOMPUTE, TimePart.BUBBLE)),
)  # fmt: skip
"""The keys of the parts, in the order in which they are shown."""


def waterfall_line(step: int, waterfall: Mapping[str, Any]) -> str:
    """`      where  model 41.0%  below_ceiling 22.3%  dp 9.1%  …`: the largest first after the model's own."""
    parts = {key: waterfall[key] for key in ORDER if waterfall.get(key)}
    first = [key for key in (MODEL, BELOW) if key in parts]
    rest = sorted((key for key in parts if key not in first), key=lambda key: -parts[key])
    shown = [f"{key} {100 * parts[key]:.1f}%" for key in (*first, *rest) if parts[key] >= _SHOWN_FROM]
    text = "  where  " + "  ".join(shown)
    while len(text) > 120:
        shown.pop()
        text = "  where  " + "  ".join([*shown, "…"])
    return text


class WaterfallReading(Reading):
    """The parts of a step, as fractions of it, the mean over all ranks; and the MFU without each of them."""

    metrics = (
        Metric(
            "waterfall",
            "where the time of a step went: object, below; `null` where the ranks' records do not tell, "
            "and in all but one line of several short steps",
            tracker="waterfall",
            line=waterfall_line,
        ),
        Metric("bubble_pct", "both bubbles of `waterfall`", unit="%", in_file=False, tracker="perf/bubble_pct"),
    )

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        every = max(1, run.cfg.log.every)
        # Only where the console shows it: it takes longer than the rest of this reading.
        first, *others = self.metrics
        shown = replace(first, line=lambda step, value: "" if step % every else waterfall_line(step, value))
        self.metrics = (shown, *others)
        self._flops: dict[int, float] = {}
        self._known = (0, 0.0, 0.0)
        self._planned: np.ndarray | None = None
        self._rested_s, self._cost_s = 0.0, 0.0

    def step(self, done: StepDone) -> Mapping[str, Any]:
        self._flops[done.step] = self._flops_of(done.tokens, done.pairs)
        if not done.rows:
            return {}
        waterfall = self._waterfall(done.rows)
        for old in [step for step in self._flops if step < done.step - _REMEMBERED]:
            del self._flops[old]
        return {"waterfall": waterfall, "bubble_pct": 100 * (waterfall[PLANNED] + waterfall[UNPLANNED])}

    def _waterfall(self, found: Sequence[StepRows]) -> dict[str, Any]:
        each = [split_blind(step.rows, self.run) for step in found]
        rows = sum(each[1:], each[0])  # of several short steps as of one
        means = (rows.mean(0) if len(rows) > 1 else rows[0]).tolist()
        seconds = means[SECONDS]
        parts = dict(zip(_KEYS, means, strict=False))
        steps = sum(step.steps for step in found)
        parts |= self._divide_bubble(rows, parts.pop(_BUBBLE), steps)
        numbers = [number for step in found for number in range(step.step - step.steps + 1, step.step + 1)]
        all_flops, ceiling = [self._flops.get(number) for number in numbers], self.run.ceiling_tflops
        flops = None if None in all_flops else sum(each for each in all_flops if each is not None)
        if flops is not None and ceiling:
            compute = parts.pop(_COMPUTE)
            parts[MODEL] = min(flops / (ceiling * 1e12), compute)
            parts[BELOW] = compute - parts[MODEL]
        shares = {key: round(parts[key] / seconds, _DIGITS) for key in ORDER if key in parts}
        values: dict[str, Any] = {"step": found[-1].step, "steps": steps, **shares}
        if flops is not None and self.run.peak_tflops:
            mfu = flops / seconds / (self.run.peak_tflops * 1e12)
            free = {
                key: round(mfu / (1 - share), _DIGITS)
                for key, share in shares.items()
                if 0 < share < 1 and key != MODEL
            }
            values["mfu_if_free"] = free
        return values

    def _flops_of(self, tokens: int, pairs: float) -> float:
        """Model FLOPs of a rank in a step; worked out anew only where steps differ, as with packed documents."""
        if self._known[:2] != (tokens, pairs):
            self._known = tokens, pairs, flops_per_step(self.run.cfg.model, tokens, pairs) / self.run.devices
        return self._known[2]

    def _divide_bubble(self, rows: np.ndarray, bubble: float, steps: int) -> dict[str, float]:
        program = self.run.program
        if program is None or len(program.ranks) == 1:
            return {PLANNED: 0.0, UNPLANNED: bubble}
        ranks = len(program.ranks)
        waited = rows[:, AT[TimePart.BUBBLE]].reshape(ranks, -1)
        self._rested_s += float(rows[0, SECONDS])
        if self._planned is None or self._rested_s * _SIMULATING >= self._cost_s:
            begin = time.perf_counter()
            self._planned = planned_idle(program, measured_times(program, rows / steps))
            self._cost_s, self._rested_s = time.perf_counter() - begin, 0.0
        planned = float(np.minimum(waited, steps * self._planned[:, None]).mean())
        return {PLANNED: planned, UNPLANNED: bubble - planned}


def split_blind(rows: np.ndarray, run: RunFacts) -> np.ndarray:
    """The rows (ranks, numbers) with the communication of which nobody knows when its last rank came divided too.

    Whoever comes last waits least: what the rank of an axis that waited least waited is communication, what the others
    waited beyond that is waiting for it.
    """
    blind = rows[:, BLIND : BLIND + len(AXES)]
    if not blind.any():
        return rows
    rows = rows.copy()
    for index, part in enumerate(AXES):
        mine = blind[:, index]
        if mine.any():
            least = mine.copy()
            for ranks in lines(run.cfg, part):
                least[ranks] = mine[ranks].min()
            rows[:, AT[part]] += least
            rows[:, AT[TimePart.STRAGGLER]] += mine - least
    return rows
