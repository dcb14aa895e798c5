"""What the routers counted in a step, and how their balance follows from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...configs.schema import ModelConfig
from ..transformer import Transformer
from .router import Router
from .tally import FIELDS, columns

__all__ = ["FIELDS", "collect_tallies", "columns", "rebalance"]


def _routers(model: Transformer) -> Iterator[tuple[int, Router]]:
    """The routers of this part of the model, each with its row of the totals."""
    rows = {layer: row for row, layer in enumerate(model.cfg.routed_layers)}
    for module in model.modules():
        if isinstance(module, Router):
            yield rows[module.index], module


@torch.no_grad()
def collect_tallies(model: Transformer, device: torch.device) -> Tensor | None:
    """What the routers of this part of the model counted since the last call, and forgets it.

    Args:
        model: a part of the model, which may be nothing at all.
        device: of the totals.

    Returns:
        (mixture-of-experts layers of the whole model, columns) as fp64, zeros for layers of other parts; the
        columns are `FIELDS`, then the choices. None for a model without such layers.
    """
    cfg: ModelConfig = model.cfg
    if not cfg.routed_layers:
        return None
    totals = torch.zeros(len(cfg.routed_layers), columns(cfg.moe), dtype=torch.float64, device=device)
    for row, router in _routers(model):
        totals[row] = router.tally
        router.tally.zero_()
    return totals


@torch.no_grad()
def rebalance(model: Transformer, totals: Tensor, skip: Tensor) -> None:
    """Moves the selection biases against the load of the step, and remembers the load for the next one.

    Args:
        totals: the sum of `collect` over all parts and their copies.
        skip: (scalar) 1 where the step was skipped, after which nothing moves.
    """
    go = (1 - skip).double()
    for row, router in _routers(model):
        router.rebalance(totals[row, len(FIELDS) :], go)
