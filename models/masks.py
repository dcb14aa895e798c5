"""Attention masks, whole or block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see: earlier ones, at most `window` back, of its own document."""

    window: int | None = None
    documents: Tensor | None = None
    """(B, T) document ids, or None for one document per sequence."""

    def dense(self, length: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, T) booleans, true where seen, or None where plain causality says it all."""
        if self.documents is None and (self.window is None or self.window >= length):
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        seen = seen[None, None]
        if self.documents is not None:
            seen = seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        return seen

    def first_key(self, query: int) -> int:
        """The first key that the query at this position, or any later one, may see."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def hidden(self, first: int, last: int, low: int, high: int) -> tuple[Tensor, int]:
        """What the queries [first, last) may not see of the keys [low, high).

        Returns:
            Booleans (B or 1, queries, keys from `start` on), true where hidden, and `start`: the keys before it are
            seen by all.
        """
        start = first if self.documents is None and self.window is None else low
        query = torch.arange(first, last)[:, None]
        key = torch.arange(start, high)[None, :]
        hidden = key > query
        if self.window is not None:
            hidden |= key <= query - self.window
        if self.documents is None:
            return hidden[None], start - low
        apart = self.documents[:, first:last, None] != self.documents[:, None, start:high]
        return hidden | apart, start - low
