"""What all layers know of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The batch's shape, rotary angles, documents, and what routers need."""

    batch: int
    length: int
    cos: Tensor | None
    sin: Tensor | None
    documents: Tensor | None = None
    """(B, T) document ids, or None for one document per sequence."""
    rows: Tensor | None = None
    """(n,) which sequence of the batch each of this device's rows of the residual stream belongs to; mixture-of-experts
    models only."""
    share: float = 0.0
    """This micro-batch's share in the step's balancing losses; 0: evaluation, in which nothing is counted."""
    kept: dict[int, Any] | None = None
    """Decisions of layers that will run again, by layer: a second run takes them out instead of deciding anew."""
