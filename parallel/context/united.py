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
        self.ranks, self._place = len(parts), place
        self._indices: dict[tuple[int, torch.device], tuple[Tensor, Tensor] | None] = {}

    def ascending(self, x: Tensor) -> Tensor:
        """(P, B, n, …) → (B, P · n, …)."""
        return self._moved(x, 0, (x.shape[1], self.ranks * x.shape[2]), x.shape[1])

    def by_rank(self, x: Tensor) -> Tensor:
        """(B, P · n, …) → (P, B, n, …)."""
        return self._moved(x, 1, (self.ranks, x.shape[0], x.shape[1] // self.ranks), x.shape[0])

    def _moved(self, x: Tensor, direction: int, tokens: tuple[int, ...], batch: int) -> Tensor:
        dims = 5 - len(tokens)  # of x's tokens: 3 with ranks, 2 without
        key = batch, x.device
        if key not in self._indices:
            self._indices[key] = self._index(batch, x.device)
        index = self._indices[key]
        if index is None:
            return x.reshape(*tokens, *x.shape[dims:])
        return x.flatten(0, dims - 1).index_select(0, index[direction]).unflatten(0, tokens)

    def _index(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Where each ascending token is among those by rank, and the other way; none where it is the same."""
        count = self._place.shape[1] // self.ranks
        sequence = torch.arange(batch)[:, None]
        forth = (self._place // count * batch * count + sequence * count + self._place % count).flatten()
        back = forth.argsort()
        if torch.equal(forth, back) and torch.equal(forth, torch.arange(len(forth))):
            return None
        return forth.to(device), back.to(device)
