"""How far the training is, and how it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats import duration, fixed
from ..metric import Column, Metric
from .protocol import Reading, RunFacts, StepDone


def _rate(lr: float) -> str:
    text = f"{lr:.2e}"
    return text if len(text) <= 8 else f"{lr:.1e}"


class ProgressReading(Reading):
    """Loss, gradient norm, learning rate; steps and tokens done, and the time to the end."""

    metrics = (
        Metric("step", "optimizer steps done, this one included"),
        Metric(
            "loss",
            "mean over all valid tokens of the global batch",
            unit="nats",
            tracker="loss/train",
            over="progress/tokens",
            column=Column("loss", 8, lambda loss: fixed(loss, 8, 4), colour="33", order=10),
        ),
        Metric(
            "grad_norm",
            "global L2 norm before clipping",
            tracker="optim/grad_norm",
            column=Column("gnorm", 8, lambda norm: fixed(norm, 8, 3), colour="36", order=20),
        ),
        Metric(
            "loss_max_rank",
            "the same over the tokens of one rank, of the rank where it is largest",
            unit="nats",
            tracker="loss/max_rank",
        ),
        Metric("lr", "learning rate", tracker="optim/lr/all", column=Column("lr", 8, _rate, colour="90", order=30)),
        Metric("tokens", "since the start of training", tracker="progress/tokens"),
        Metric(
            "skipped",
            "steps skipped for a NaN or infinite gradient, since the start of training",
            tracker="optim/skipped",
        ),
        Metric("done_pct", "steps done, of `train.steps`", unit="%", in_file=False, tracker="progress/pct"),
        Metric(
            "eta_s",
            "time left, from the mean step time without the first three steps",
            unit="s",
            in_file=False,
            tracker="progress/eta_s",
            column=Column("eta", 6, duration, colour="90", order=120),
        ),
    )

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        self._pace = Pace(run.cfg.train.steps)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {
            "step": done.step,
            "loss": done.loss,
            "loss_max_rank": done.loss_max_rank,
            "grad_norm": done.grad_norm,
            "lr": done.lr,
            "tokens": done.tokens_seen,
            "skipped": done.skips,
            "done_pct": 100.0 * done.step / max(1, self.run.cfg.train.steps),
            "eta_s": self._pace.eta_s(done.step, done.seconds),
        }


class Pace:
    """Time to the end, from the mean step time without the first steps, which compile and warm up."""

    WARMUP_STEPS = 3

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._seen, self._seconds = 0, 0.0

    def eta_s(self, step: int, seconds: float) -> float | None:
        """Seconds left after this step; None during the first three of this process. Called once a step."""
        self._seen += 1
        counted = self._seen - self.WARMUP_STEPS
        if counted <= 0:
            return None
        self._seconds += seconds
        return max(0, self.total_steps - step) * self._seconds / counted
