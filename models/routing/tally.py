"""What a router counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ...configs.schema import MoeConfig
from .choice import choices_of
from .losses import Losses
from .tally_fields import FIELDS


def columns(moe: MoeConfig) -> int:
    """Columns of a tally."""
    return len(FIELDS) + choices_of(moe)


@torch.no_grad()
def add_to(
    tally: Tensor, moe: MoeConfig, counts: Tensor, experts: Tensor, shares: Tensor, losses: Losses, share: float
) -> None:
    """Adds a microbatch to a tally, without asking the device for a number.

    Args:
        tally: (columns,) fp64.
        counts: (C,) fp64, how often each choice was taken, before any was dropped.
        experts: (n, K) ids of experts, -1 where a token goes to none.
        shares: (n, C) scores that sum to 1 for each token.
        losses: this device's part.
        share: the microbatch's share in the step.
    """
    assigned = counts[: moe.experts].sum()
    zero = torch.zeros_like(assigned)
    values = {
        "tokens": zero + len(shares),
        "assignments": assigned,
        "dropped": assigned - (experts >= 0).sum(),
        "null": counts[moe.experts :].sum(),
        "entropy": torch.special.entr(shares).sum(dtype=torch.float64),
        "top1": shares.amax(-1).sum(dtype=torch.float64),
        "aux": zero if losses.balance is None else losses.balance.double() * share,
        "z": losses.z.double() * share,
    }
    tally += torch.cat((torch.stack([values[name] for name in FIELDS]), counts))
