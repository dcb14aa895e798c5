"""The rank that the others wait for: docs/observability.md."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ....models.costs.flops import step_flops
from ....models.routing.tally_fields import FIELDS
from ....parallel.record.parts import AT, AXES, PAIRS, SECONDS, WAITS, TimePart
from ....parallel.record.stragglers import Reason, Stragglers, StragglerVerdict
from ..heat_map import straggler_image
from ..metric import Alert, Column, Metric, Picture
from ..rows import StepRows
from .protocol import OnRank, Reading, RunFacts, StepDone
from .roles import expert_grid, grid
from .routing import is_pictured

_WINDOWS_SHOWN = 200
_REMEMBERED = 32
"""Steps of which is kept what their rows, which come later, are compared with."""


def slowest(straggler: Mapping[str, Any]) -> str:
    """`r12@node3 +8%`: score is the peers' median time over this rank's (1: as fast as they are)."""
    if straggler.get("rank") is None:
        return "-"
    score = straggler.get("score")
    excess = f" {100 * (1 / score - 1):+.0f}%" if score else ""
    host = f"@{straggler['host']}" if straggler.get("host") else ""
    rank = f"r{straggler['rank']}"
    return rank + host[: 15 - len(rank) - len(excess)] + excess


def roles(run: RunFacts) -> np.ndarray:
    """(ranks,) the same number for ranks whose loads can be compared: of one stage of the pipeline and, as causal
    attention may give the ranks of cp different shares, one place on cp."""
    ranks = grid(run.cfg)
    pp, dp, cp, tp = ranks.shape
    found = np.arange(pp)[:, None, None, None] * cp + np.arange(cp)[None, None, :, None]
    if dp * tp == 1:
        found = found // cp
    return np.broadcast_to(found, ranks.shape).ravel()


class StragglerReading(Reading):
    """The slowest rank of each window of 20 steps, an alert once it is confirmed, how long the ranks wait, and how long
    one of them was silent."""

    metrics = (
        Metric(
            "straggler",
            "the rank that the others wait for: object, below; `null` in the first window of 20 steps",
            column=Column("slowest", 15, slowest, colour="31", order=115),
        ),
        Metric("straggler_tracked", "of the window, below", in_file=False, tracker="straggler"),
        Metric("waits_tracked", "of the window, below", in_file=False, tracker="wait"),
        Metric(
            "mfu_if_no_straggler",
            "`mfu` without the straggler, of the window",
            unit="fraction of 1",
            in_file=False,
            tracker="perf/mfu_if_no_straggler",
        ),
        Metric("ckpt_block_ms", "what a save took of the step", unit="ms", in_file=False, tracker="ckpt/block_ms"),
        Metric("ckpt_age_steps", "steps since the last save", in_file=False, tracker="ckpt/age_steps"),
        Metric(
            "hb_age_max_ms",
            "the longest time that a rank gave no sign of life; one is due every 20 ms",
            unit="ms",
            in_file=False,
            tracker="hb/age_max_ms",
        ),
        Metric("fault_epoch", "how many times the ranks' mesh was built anew", in_file=False, tracker="fault/epoch"),
        Metric(
            "straggler_alert",
            "a message, and an event, when a straggler is confirmed",
            in_file=False,
            tracker="straggler/alert",
            line=lambda _, alert: alert.text,
        ),
    )

    watched = 1

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        self._stragglers = Stragglers(roles(run).tolist())
        self._places = expert_grid(run.cfg)
        self._routed: dict[int, np.ndarray] = {}
        self._seconds: list[np.ndarray] = []
        self._waits: list[np.ndarray] = []
        self._windows: deque[tuple[int, np.ndarray]] = deque(maxlen=_WINDOWS_SHOWN)
        self._last: dict[str, Any] | None = None
        self._told: int | None = None
        self._saved: int | None = None

    def watch(self, mine: OnRank) -> Sequence[float]:
        return (mine.silent_s(),)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        silent = 1e3 * done.worst[0]
        return {"hb_age_max_ms": silent or None, "fault_epoch": self.run.epoch, **self._compared(done)}

    def _compared(self, done: StepDone) -> Mapping[str, Any]:
        """What the ranks' rows tell."""
        if done.routed is not None:
            self._routed[done.step] = done.routed
        if not done.rows:
            return {"straggler": self._last}
        values = self._checkpoints(done.rows)
        if len(done.rows[0].rows) == 1:
            return values  # there is nobody to wait for it
        verdicts = [found for each in done.rows if (found := self._taken(each)) is not None]
        for old in [step for step in self._routed if step < done.step - _REMEMBERED]:
            del self._routed[old]
        if not verdicts:
            return values | {"straggler": self._last, "straggler_tracked": self._picture(done.step)}
        verdict = verdicts[-1]
        self._windows.append((verdict.step, verdict.scores))
        seen = self._seen(verdict)
        self._last = {key: value for key, value in seen.items() if key != "slower"}
        values |= {
            "straggler": seen,
            "straggler_tracked": self._tracked(verdict, done.step),
            "waits_tracked": self._waited(),
        }
        mfu = self._mfu(done)
        values["mfu_if_no_straggler"] = None if mfu is None else mfu / (1 - min(verdict.cost, 0.99))
        alert = self._alert(verdict)
        return values if alert is None else values | {"straggler_alert": alert}

    def _taken(self, found: StepRows) -> StragglerVerdict | None:
        """Adds a step; at the end of a window what it says."""
        self._seconds.append(found.rows[:, SECONDS])
        self._waits.append(found.rows[:, WAITS : WAITS + len(AXES)])
        return self._stragglers.step(found.step, found.rows, self._work(found))

    @cached_property
    def _shares(self) -> tuple[float, float]:
        """Of the model's FLOPs: those of attention's pairs, and those of routed experts."""
        train, model = self.run.cfg.train, self.run.cfg.model
        flops = step_flops(model, train.seq_len, train.seq_len**2 / 2)
        return flops.attention / flops.total, flops.experts / flops.total

    def _work(self, found: StepRows) -> np.ndarray:
        """(ranks,) what each rank was given to do, over the mean."""
        work, pairs = np.ones(len(found.rows)), found.rows[:, PAIRS]
        if found.step not in self._routed and (pairs == pairs[0]).all():
            return work
        attention, experts = self._shares
        if pairs.mean() > 0:
            work += attention * (pairs / pairs.mean() - 1)
        routed, places = self._routed.get(found.step), self._places
        if routed is not None and places.shape[2] > 1:
            load = routed[:, len(FIELDS) : len(FIELDS) + self.run.cfg.model.moe.experts]
            rows = load.reshape(len(load), places.shape[2], -1).sum((0, 2))
            share = np.broadcast_to((rows / max(rows.mean(), 1) - 1)[None, None, :, None], places.shape)
            work[places.ravel()] += experts * share.ravel()
        return work

    def _seen(self, verdict: StragglerVerdict) -> dict[str, Any]:
        host = (
            self.run.hosts.get(verdict.rank)
            if verdict.rank is not None and len(set(self.run.hosts.values())) > 1
            else None
        )
        return {
            "step": verdict.step,
            "rank": verdict.rank,
            "host": host,
            "peer": verdict.peer,
            "score": round(verdict.score, 4),
            "z": round(verdict.z, 2),
            "reason": verdict.reason,
            "confirmed": verdict.confirmed,
            "cost": round(verdict.cost, 4),
            "slower": [round(1 / score - 1, 3) for score in verdict.scores.tolist()],
        }

    def _tracked(self, verdict: StragglerVerdict, step: int) -> dict[str, Any]:
        seconds = np.median(np.stack(self._seconds), 0)
        self._seconds.clear()
        return {
            "score_min": float(verdict.scores.min()),
            "score_p50": float(np.median(verdict.scores)),
            "rank": verdict.rank if verdict.reason is not None else None,
            "slowest_rank": int(verdict.scores.argmin()),
            "class": verdict.reason,
            "peer": verdict.peer,
            "cost_pct": 100 * verdict.cost,
            "max_over_median": float(1 / verdict.scores.min()),
            "n_flagged": int(verdict.confirmed),
            "step_spread": float(seconds.max() / np.median(seconds)),
            **(self._picture(step, wanted=verdict.confirmed and self._told != verdict.rank) or {}),
        }

    def _picture(self, step: int, *, wanted: bool = False) -> dict[str, Any] | None:
        """The heat map, at some steps and with an alert."""
        log = self.run.cfg.log
        wanted = wanted and (log.wandb or log.tensorboard)
        if not self._windows or not (wanted or is_pictured(self.run.cfg, step)):
            return None
        steps, scores = zip(*self._windows, strict=True)
        return {"heat_map": Picture(straggler_image(list(steps), 1 / np.stack(scores) - 1))}

    def _waited(self) -> dict[str, Any]:
        """Milliseconds of a step that ranks wait for communication, by axis: the median and the 99th percentile over
        ranks and steps of the window."""
        waits = 1e3 * np.concatenate(self._waits)
        self._waits.clear()
        return {
            f"{part.value}_ms": {"p50": float(np.median(waits[:, i])), "p99": float(np.quantile(waits[:, i], 0.99))}
            for i, part in enumerate(AXES)
            if waits[:, i].any()
        }

    def _mfu(self, done: StepDone) -> float | None:
        if not self.run.peak_tflops:
            return None
        flops = step_flops(self.run.cfg.model, done.tokens, done.pairs).total
        return flops / (done.seconds * self.run.devices) / (self.run.peak_tflops * 1e12)

    def _checkpoints(self, found: Sequence[StepRows]) -> dict[str, Any]:
        blocked = [(float(each.rows[:, AT[TimePart.CHECKPOINT]].max()), each.step) for each in found]
        longest, step = max(blocked)
        if longest:
            self._saved = step - 1  # saved after the step before, within this step's time
        age = None if self._saved is None else found[-1].step - self._saved
        return {"ckpt_block_ms": 1e3 * longest if longest else None, "ckpt_age_steps": age}

    def _alert(self, verdict: StragglerVerdict) -> Alert | None:
        if not verdict.confirmed or verdict.rank is None or verdict.reason is None:
            self._told = None if not verdict.confirmed else self._told
            return None
        if self._told == verdict.rank:
            return None
        self._told = verdict.rank
        host = self.run.hosts.get(verdict.rank)
        slower = 100 * (1 / verdict.score - 1)
        text = (
            f"straggler: rank {verdict.rank}{f' on {host}' if host else ''} is {slower:.0f}% slower than its peers "
            f"({_why(verdict)}); steps would be {100 * verdict.cost:.0f}% shorter without it"
        )
        fields = {key: value for key, value in self._seen(verdict).items() if key != "slower"} | {"host": host}
        return Alert(f"straggler: rank {verdict.rank}", text, "straggler", fields)


def _why(verdict: StragglerVerdict) -> str:
    assert verdict.reason is not None
    return _WORDS[verdict.reason] if verdict.peer is None else f"its link with rank {verdict.peer}"


_WORDS = {
    Reason.COMPUTE: "compute",
    Reason.DATA: "its data come late",
    Reason.NETWORK: "its network",
    Reason.IMBALANCE: "it has more to do",
    Reason.GC: "Python's garbage collection",
    Reason.CONTENTION: "other processes take its cores",
}
