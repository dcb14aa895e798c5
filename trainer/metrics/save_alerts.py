"""What is told of a save that failed or was passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .metric import Alert, Metric
from .report import Report

SAVE_ALERT = Metric("save_alert", "a message when a save failed or was passed over", in_file=False)


def save_alerts(step: int, events: Sequence[Mapping[str, Any]]) -> Report:
    """What trackers that can send messages are given.

    Args:
        step: optimizer steps done.
        events: `checkpoint_failed` and `checkpoint_skipped`.
    """
    alerts: list[tuple[Metric, Alert]] = []
    for event in events:
        text = f"step {event['step']} is not saved: {event['reason']}"
        alerts.append((SAVE_ALERT, Alert(f"checkpoint of step {event['step']}", text, event["event"], event)))
    return Report.of(step, alerts)
