"""Tokens of several ranks brought together, in the order of their sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.mask import TokenIndex
from ..kernels.upload import upload


class GatheredTokens:
    """The tokens of P ranks with n tokens of each of B sequences, which were dealt out in any way. Made once for all
    layers: `layout.once(GatheredTokens, layout.ranks)`.

    Args:
        parts: the ranks' rows.
    """

    def __init__(self, parts: Sequence[TokenIndex]) -> None:
        order, place = torch.cat([rows.order for rows in parts], 1).sort(1)
        ids = [rows.documents for rows in parts if rows.documents is not None]
        documents = None
        if ids:
            whole = torch.cat(ids, 1)
            documents = whole.gather(1, place.to(whole.device).expand(len(whole), -1))
        self.rows = TokenIndex(order, documents)
        self._ranks, self._place = len(parts), place
        self._indices: dict[torch.device, Tensor | None] = {}

    def put(self, whole: Tensor, part: slice, x: Tensor) -> None:
        """x (P, B, m, …), these m of each rank's n tokens, go where they belong in whole (B, P · n, …)."""
        index = self._index(whole.device)
        if index is None:
            self._aligned(whole)[:, :, part] = x
        else:
            whole[_sequences(whole), index[:, :, part]] = x

    def get(self, whole: Tensor, part: slice) -> Tensor:
        """What `put` put there, in its shape; a view where that is possible."""
        index = self._index(whole.device)
        if index is None:
            return self._aligned(whole)[:, :, part]
        return whole[_sequences(whole), index[:, :, part]]

    def _aligned(self, whole: Tensor) -> Tensor:
        """(B, P · n, …) → (P, B, n, …), a view, where ranks have consecutive tokens."""
        return whole.unflatten(1, (self._ranks, -1)).transpose(0, 1)

    def _index(self, device: torch.device) -> Tensor | None:
        """The places (P, B or 1, n) of the ranks' tokens in their sequences; none: consecutive ones."""
        if device not in self._indices:
            place = self._place
            consecutive = torch.equal(place, torch.arange(place.shape[1]).expand_as(place))
            by_rank = place.argsort(1).unflatten(1, (self._ranks, -1)).transpose(0, 1)
            self._indices[device] = None if consecutive else upload(by_rank.contiguous(), device)
        return self._indices[device]


def _sequences(whole: Tensor) -> Tensor:
    """(B, 1) of what has B sequences."""
    return torch.arange(len(whole), device=whole.device)[:, None]
