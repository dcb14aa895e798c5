"""Which tokens of their sequences a device has, and which keys a query may see.

Nothing here assumes how tokens were dealt out: every token carries its place in its whole sequence and its document,
and masks compare those. Whatever method brings keys to queries, the mask of a block follows from its two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Remembers:
    """Keeps what follows from it and all layers need to know."""

    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, make: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """make(…), made by the first call with equal `make` and arguments."""
        key = (make, args, tuple(kwargs.items()))
        if key not in self._made:
            self._made[key] = make(*args, **kwargs)
        return self._made[key]


@dataclass(frozen=True)
class TokenIndex:
    """n tokens of each of B sequences.

    Args:
        order: (B or 1, n) place of each token in its whole sequence, ascending; on the host.
        documents: (B, n) document ids, or none: one document per sequence.
    """

    order: Tensor
    documents: Tensor | None = None

    @staticmethod
    def whole(length: int, documents: Tensor | None = None) -> TokenIndex:
        """All tokens of sequences of this length."""
        return TokenIndex(torch.arange(length)[None], documents)

    @property
    def count(self) -> int:
        """Tokens per sequence, n."""
        return self.order.shape[1]

    def part(self, start: int, stop: int) -> TokenIndex:
        """The tokens [start, stop) of each sequence."""
        documents = None if self.documents is None else self.documents[:, start:stop]
        return TokenIndex(self.order[:, start:stop], documents)


@dataclass(frozen=True)
class TokenLayout(Remembers):
    """How the tokens of a microbatch are dealt out: every rank of the context axis knows every rank's rows.

    Args:
        ranks: the rows of each rank, equally many; together each sequence's tokens exactly once.
        rank: this one.
    """

    ranks: tuple[TokenIndex, ...]
    rank: int = 0

    @staticmethod
    def whole(length: int, documents: Tensor | None = None) -> TokenLayout:
        """All tokens of sequences of this length on one device; without documents the same object every time."""
        return _whole(length) if documents is None else TokenLayout((TokenIndex.whole(length, documents),))

    @property
    def length(self) -> int:
        """Tokens of a whole sequence."""
        return len(self.ranks) * self.mine.count

    @property
    def mine(self) -> TokenIndex:
        """This rank's rows."""
        return self.ranks[self.rank]

    @cached_property
    def joined(self) -> Tensor | None:
        """(B,) whether this rank's first tokens go on with documents of the rank before; none: all do, or no such rank.

        For runs of tokens in rank order.
        """
        now = self.mine.documents
        before = self.ranks[self.rank - 1].documents if self.rank else None
        return None if now is None or before is None else before[:, -1] == now[:, 0]


@lru_cache(maxsize=16)
def _whole(length: int) -> TokenLayout:
    return TokenLayout((TokenIndex.whole(length),))


@dataclass(frozen=True)
class Mask(Remembers):
    """Which keys each query may see: those not after it, at most `window` back, of its own document.

    Args:
        queries, keys: the two sides.
        window: in tokens, the query's own included; none: unlimited.
    """

    queries: TokenIndex
    keys: TokenIndex
    window: int | None = None

    @staticmethod
    def of(rows: TokenIndex, window: int | None = None) -> Mask:
        """Of tokens among themselves."""
        return Mask(rows, rows, window)

    def reach(self, first: int, last: int) -> tuple[int, int, int]:
        """(low, high, start): the queries [first, last) see nothing outside the keys [low, high), and all of them see
        all of the keys [low, start). Sequences of a batch share the range.
        """
        order, keys = self.queries.order, self.keys.order
        newest, oldest = order[:, last - 1].max(), order[:, first].min()
        keys, column = keys.contiguous(), (len(keys), 1)
        high = int(torch.searchsorted(keys, newest.expand(column).contiguous(), right=True).max())
        low = 0
        if self.window is not None:
            low = int(torch.searchsorted(keys, (oldest - self.window + 1).expand(column).contiguous()).min())
        if self.queries.documents is not None or self.window is not None:
            return low, high, low
        start = int(torch.searchsorted(keys, oldest.expand(column).contiguous(), right=True).min())
        return low, high, min(start, high)

    @property
    def is_empty(self) -> bool:
        """Whether places alone tell that no query sees a key."""
        low, high, _ = self.reach(0, self.queries.count)
        return low >= high

    def hidden(self, first: int, last: int, low: int, high: int) -> Tensor:
        """(B or 1, queries, keys) booleans: what the queries [first, last) may not see of the keys [low, high)."""
        query, key = self.queries.order[:, first:last, None], self.keys.order[:, None, low:high]
        hidden = key > query
        if self.window is not None:
            hidden |= key <= query - self.window
        mine, theirs = self.queries.documents, self.keys.documents
        if mine is None or theirs is None:
            return hidden
        return hidden | (mine[:, first:last, None] != theirs[:, None, low:high])

    def dense(self, device: torch.device) -> Tensor:
        """(B or 1, 1, queries, keys) booleans, true where seen."""
        return ~self.hidden(0, self.queries.count, 0, self.keys.count)[:, None].to(device)
