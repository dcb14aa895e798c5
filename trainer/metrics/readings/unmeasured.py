"""The keys that metrics.jsonl has from the start, so that who reads it can rely on them, and that nothing fills yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..metric import Column, Metric
from .protocol import Reading, StepDone


def slowest(straggler: Mapping[str, Any]) -> str:
    """`r12@node3 +8%`: score is the peers' median time over this rank's (1: as fast as they are)."""
    if straggler.get("rank") is None:
        return "-"
    score = straggler.get("score")
    excess = f" {100 * (1 / score - 1):+.0f}%" if score else ""
    host = f"@{straggler['host']}" if straggler.get("host") else ""
    rank = f"r{straggler['rank']}"
    return rank + host[: 15 - len(rank) - len(excess)] + excess


class Unmeasured(Reading):
    """Where the time of a step went, and the rank that the others waited for: not known."""

    metrics = (
        Metric(
            "waterfall", "reserved for an object; nothing measures it yet, and it is always `null`", tracker="waterfall"
        ),
        Metric(
            "straggler",
            "reserved for an object; nothing measures it yet, and it is always `null`",
            tracker="straggler",
            column=Column("slowest", 15, slowest, colour="31", order=115),
        ),
    )

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {}
