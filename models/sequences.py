"""What all layers know of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parallel.kernels.mask import TokenLayout


@dataclass(frozen=True)
class Sequences:
    """The batch's shape, rotary angles, place of the tokens, and what routers need."""

    batch: int
    length: int
    cos: Tensor | None
    sin: Tensor | None
    layout: TokenLayout
    """Which tokens of the sequences these are, their documents, and who has the others."""
    rows: Tensor | None = None
    """(n,) which sequence of the batch each of this device's rows of the residual stream belongs to; mixture-of-experts
    models only."""
    share: float = 0.0
    """This microbatch's share in the step's balancing losses; 0: evaluation, in which nothing is counted."""
    kept: dict[int, Any] | None = None
    """Decisions of layers that will run again, by layer: a second run finds them here instead of deciding anew."""
    places: Tensor | None = None
    """(n,) which token of the whole microbatch each row is; mixture-of-experts models only."""
