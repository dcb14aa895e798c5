"""Tokens in blocks: of each block the first ones are kept, the others are made again (`recompute`). No torch.

The rows of tensors are tokens, in one of two shapes: (N, …) of up to two dims, and (B, T, …) of more. A rank's rows of
the residual stream, all rows that projections see, and the tokens of each sequence are whole numbers of blocks; so what
is cut out of one of them is what belongs to it in the others, also after ranks have gathered their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .saved_tensors import Strided


@dataclass(frozen=True)
class TokenBlocks:
    """How tokens are divided.

    Args:
        size: tokens of a block.
        kept: of each block, the first ones; fewer than all, and not none.
    """

    size: int
    kept: int

    @staticmethod
    def largest(length: int, rows: int) -> int:
        """The largest size of which sequences of `length` tokens and a rank's rows of the residual stream are whole
        numbers."""
        return gcd(length, rows)

    @property
    def again(self) -> float:
        """The share of tokens that is made again."""
        return 1 - self.kept / self.size

    def first(self, x: Tensor) -> Tensor:
        """A copy of the kept tokens of x (N, …) or (B, T, …), block by block."""
        blocks, dim = self._blocks(x)
        mine = blocks.narrow(dim, 0, self.kept)
        return mine.new_empty(mine.shape).copy_(mine)

    def rest(self, x: Tensor) -> Tensor:
        """The other tokens of x (N, …) or (B, T, …), in the same shape but for their number."""
        blocks, dim = self._blocks(x)
        return blocks.narrow(dim, self.kept, self.size - self.kept).flatten(dim - 1, dim)

    def joined(self, how: Strided, elements: int, first: Tensor, rest: Tensor) -> Tensor:
        """The tensor of which these are the parts, in a storage of its own that has so many elements."""
        whole = rest.new_empty(elements).as_strided(how.shape, how.stride, how.offset)
        blocks, dim = self._blocks(whole)
        blocks.narrow(dim, 0, self.kept).copy_(first)
        others = self.size - self.kept
        blocks.narrow(dim, self.kept, others).copy_(rest.unflatten(dim - 1, (-1, others)))
        return whole

    def _blocks(self, x: Tensor) -> tuple[Tensor, int]:
        """x with its tokens divided, and the dim of the tokens of a block."""
        dim = 0 if x.dim() <= 2 else 1
        if x.shape[dim] % self.size:
            raise RuntimeError(f"{tuple(x.shape)} are no rows of tokens in blocks of {self.size}")
        return x.unflatten(dim, (-1, self.size)), dim + 1
