"""Learning rate over the steps."""

from __future__ import annotations

import math

from ...configs.schema import ConstantSchedule, CosineSchedule, LinearSchedule, WsdSchedule


def learning_rate(cfg: ConstantSchedule, peak: float, step: int, steps: int) -> float:
    """The rate of step `step` (0-based) of `steps`: linear warm-up to `peak`, then the schedule's decay.

    A decay would reach min_ratio · peak one step after the last, so that no step of a run has the rate 0 (of which
    nothing is learnt) after the first.
    """
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1)
    match cfg:
        case CosineSchedule():
            return peak * (cfg.min_ratio + (1 - cfg.min_ratio) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        case LinearSchedule():
            return peak * (1 - (1 - cfg.min_ratio) * min(done, 1.0))
        case WsdSchedule():
            decayed = max(0.0, 1 - max(steps - step, 0) / (cfg.decay_steps + 1))
            return peak * (1 - (1 - cfg.min_ratio) * decayed)
        case _:
            return peak
