"""The one rule of precision: sums, statistics and whatever else must not be rounded."""

from __future__ import annotations

import torch


def precise(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of this type are summed up: fp32, and fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
