"""The tokens of a microbatch, of which a device may have only a part."""

from __future__ import annotations

import torch
from torch import Tensor

from ..comm.collectives import all_gather, all_reduce
from ..comm.mesh import Axis


class TokenPool:
    """The tokens of a microbatch, of which each rank has equally many. Nothing here has a gradient.

    Args:
        axis: the ranks that share them.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @staticmethod
    def whole() -> TokenPool:
        """Of one device, which has all tokens."""
        return TokenPool(Axis.single("tokens"))

    def count(self, mine: int) -> int:
        """Tokens of the microbatch where this rank has `mine`."""
        return mine * self.axis.size

    @torch.no_grad()
    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x (…,)."""
        return x if self.axis.size == 1 else all_reduce(x.clone(), self.axis).wait()

    @torch.no_grad()
    def gather(self, x: Tensor, places: Tensor) -> Tensor:
        """(n, …) of each rank → (N, …), in the order of the tokens.

        Args:
            places: (n,) which token of the microbatch each row is.
        """
        if self.axis.size == 1:
            return x
        found, where = all_gather(x.contiguous(), self.axis), all_gather(places, self.axis)
        whole = torch.empty_like(found.wait())
        whole[where.wait()] = found.wait()
        return whole

    def mine(self, x: Tensor, places: Tensor) -> Tensor:
        """(N, …) → (n, …): the rows of this rank's tokens."""
        return x if self.axis.size == 1 else x[places]
