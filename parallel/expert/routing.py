"""What a router decided, in the words that routers, dispatchers and experts share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Where each of n tokens goes: to at most K experts.

    Args:
        experts: (n, K) ids of experts; -1: nowhere (a null expert, or dropped).
        weights: (n, K) factors of the experts' outputs, with their gradient; 0 where the id is -1.
        capacity: rows that every expert gets from this device where shapes are fixed (`moe.pad`), else none.
        memo: what a dispatcher found out about `experts`; the same object when a layer runs again for its backward.
    """

    experts: Tensor
    weights: Tensor
    capacity: int | None = None
    memo: dict[str, Any] = field(default_factory=dict)
