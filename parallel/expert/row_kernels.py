"""Who moves and sorts rows on a device: torch's operators, or kernels of fewer launches in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from . import permute
from .plan import SortByExpert, sort_by_expert


class Spread(Protocol):
    """As `permute.spread`."""

    def __call__(self, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor: ...


class Combine(Protocol):
    """As `permute.combine`."""

    def __call__(self, rows: Tensor, places: Tensor, weights: Tensor | None = None, padded: bool = True) -> Tensor: ...


@dataclass(frozen=True)
class RowKernels:
    """What dispatchers do with rows.

    Args:
        sort: of a device that plans without its host.
    """

    spread: Spread = permute.spread
    combine: Combine = permute.combine
    sort: SortByExpert = sort_by_expert
