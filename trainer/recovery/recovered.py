"""What trackers learn of a recovery. No torch here."""

from __future__ import annotations

from ..metrics.metric import Metric

MTTR = Metric(
    "mttr_ms",
    "from when a fault was seen to when the first rank trains again, a step done again not counted",
    unit="ms",
    in_file=False,
    tracker="fault/mttr_ms",
    line=lambda step, ms: f"goes on at step {step} after a fault: {ms:.0f} ms",
)
LOST_STEPS = Metric(
    "lost_steps",
    "steps that some rank had done before a fault and that are done again after it",
    unit="steps",
    in_file=False,
    tracker="fault/lost_steps",
)
