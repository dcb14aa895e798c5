"""What routers counted in a step, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from .transformer import Transformer


def collect(model: Transformer) -> Tensor | None:
    """What this rank's routers counted since the last call: (mixture-of-experts layers of the whole model, columns)."""
    return None


def settle(model: Transformer, totals: Tensor, skip: Tensor) -> None:
    """Moves selection biases and loads after a step."""
