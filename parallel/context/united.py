"""Tokens of several ranks brought together, in the order of their sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import Rows


class United:
    """The tokens of P ranks with n tokens of each of B sequences, which were dealt out in any way. Made once for all
    layers: `spread.once(United, spread.ranks)`.

    Args:
        parts: the ranks' rows.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        order, place = torch.cat([rows.order for rows in parts], 1).sort(1)
        ids = [rows.documents for rows in parts if rows.documents is not None]
        documents = None
        if ids:
            whole = torch.cat(ids, 1)
            documents = whole.gather(1, place.to(whole.device).expand(len(whole), -1))
        self.rows = Rows(order, documents)
        self._ranks, self._place = len(parts), place
        self._indices: dict[tuple[int, torch.device], Tensor | None] = {}

    def put(self, whole: Tensor, part: slice, x: Tensor) -> None:
        """x (P, B, m, …), these m of each rank's n tokens, go where they belong in whole (B, P · n, …)."""
        index = self._index(whole)
        if index is None:
            self._aligned(whole)[:, :, part] = x
        else:
            whole.flatten(0, 1).index_copy_(0, index[:, :, part].flatten(), x.flatten(0, 2))

    def get(self, whole: Tensor, part: slice) -> Tensor:
        """What `put` put there, in its shape; a view where that is possible."""
        index = self._index(whole)
        if index is None:
            return self._aligned(whole)[:, :, part]
        chosen = index[:, :, part]
        return whole.flatten(0, 1).index_select(0, chosen.flatten()).unflatten(0, chosen.shape)

    def _aligned(self, whole: Tensor) -> Tensor:
        """(B, P · n, …) → (P, B, n, …), a view, where ranks have consecutive tokens."""
        return whole.unflatten(1, (self._ranks, -1)).transpose(0, 1)

    def _index(self, whole: Tensor) -> Tensor | None:
        """The places (P, B, n) of the ranks' tokens among all of the batch; none: consecutive ones."""
        key = len(whole), whole.device
        if key not in self._indices:
            self._indices[key] = self._places(*key)
        return self._indices[key]

    def _places(self, batch: int, device: torch.device) -> Tensor | None:
        tokens = self._place.shape[1]
        if torch.equal(self._place, torch.arange(tokens).expand_as(self._place)):
            return None
        places = self._place.argsort(1) + torch.arange(batch)[:, None] * tokens
        return places.unflatten(1, (self._ranks, -1)).transpose(0, 1).contiguous().to(device)
