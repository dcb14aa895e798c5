"""The projection seam: the one place where a model multiplies by a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..parallel import grouped_projection
from ..parallel.grouped_projection import GroupedProjection, Groups, RecomputedInput
from ..parallel.projection import Projection, local


class Linear(nn.Module):
    """y = x Wᵀ + b for x (N, in), y (N, out).

    `apply_weights` is replaceable from outside; it sees all the linears that read the same input at once.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.apply_weights: Projection = local

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) → y (N, out)."""
        return self.apply_weights(x, (self,))[0]


def project(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """Several linears of the same input x (N, in), each giving its y (N, out)."""
    return linears[0].apply_weights(x, linears)


class GroupedLinear(nn.Module):
    """One linear per expert: y = x W_eᵀ + b_e for the rows x (R, in) of each expert e, y (R, out).

    An input made with weights of the rows (`RecomputedInput`) gives w x W_eᵀ + w b_e.
    """

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(experts, out_features)) if bias else None
        self.apply_weights: GroupedProjection = grouped_projection.local

    def forward(self, x: Tensor | RecomputedInput, groups: Groups) -> Tensor:
        """Rows x (R, in), in the order of `groups` → y (R, out)."""
        return self.apply_weights(x, groups, (self,))[0]


def project_grouped(x: Tensor | RecomputedInput, groups: Groups, *linears: GroupedLinear) -> tuple[Tensor, ...]:
    """Several grouped linears of the same rows x (R, in), each giving its y (R, out)."""
    return linears[0].apply_weights(x, groups, linears)
