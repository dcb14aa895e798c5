"""The tokens of a micro-batch, of which a device may have only a part."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import all_gather, all_reduce
from ..mesh import Axis


class TokenGroup:
    """The ranks that share the tokens of a micro-batch, each an equal run of them. Nothing here has a gradient.

    Args:
        axis: these ranks, in the order of their tokens.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @torch.no_grad()
    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x."""
        return x if self.axis.size == 1 else all_reduce(x.clone(), self.axis).wait()

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """(n, …) of each rank → (N, …), in the order of the tokens."""
        return all_gather(x.contiguous(), self.axis).wait()

    def mine(self, x: Tensor) -> Tensor:
        """(N, …) → (n, …): the rows of this rank's tokens."""
        rows = x.shape[0] // self.axis.size
        return x.narrow(0, self.axis.rank * rows, rows)
