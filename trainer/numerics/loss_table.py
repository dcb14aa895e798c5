"""What each microbatch of the global batch adds to the loss, brought together as a maximum in which everybody is silent
about all but their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...parallel.comm.mesh import Mesh


def loss_table(losses: Sequence[Tensor], count: int, mesh: Mesh, device: torch.device) -> Tensor:
    """(microbatches of the global batch · context ranks,) fp64, what this rank knows of it: infinity for a loss that is
    no number, -infinity for what others know. Waits for nothing.

    Args:
        losses: of this rank's microbatches, where it counts them.
        count: of its microbatches.
        mesh: whose dp ranks have microbatches of their own, and whose cp ranks share each.
        device: of the losses.
    """
    dp, cp = mesh.axis("dp"), mesh.axis("cp")
    table = torch.full((count, dp.size, cp.size), -math.inf, dtype=torch.float64, device=device)
    if losses:
        table[:, dp.rank, cp.rank] = torch.stack(list(losses)).double().nan_to_num(nan=math.inf)
    return table.flatten()


def loss_shares(table: Sequence[float], cp: int) -> tuple[float, ...]:
    """What each microbatch adds to the loss, infinite where that is no finite number, from the maximum over all ranks
    of their `loss_table`; of `cp` context ranks. Empty where some of it is not known."""
    if -math.inf in table:
        return ()
    return tuple(sum(table[at : at + cp]) for at in range(0, len(table), cp))
