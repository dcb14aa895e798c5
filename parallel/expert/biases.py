"""Biases of experts whose inner width is cut: partial outputs are summed, so only one rank adds the bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients import plain_grad
from ..grouped_projection import GroupedProjection, Groups, RecomputedInput
from ..projection import HasWeight


@dataclass
class _Bare:
    weight: Any
    bias: Any = None


def without_bias(projection: GroupedProjection) -> GroupedProjection:
    """`projection`, but biases add nothing and get zero gradients: for all ranks of etp but the first."""

    def project(x: Tensor | RecomputedInput, groups: Groups, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
        outputs = projection(x, groups, [_Bare(linear.weight) for linear in linears])
        return tuple(
            y if linear.bias is None else _Unmoved.apply(y, linear.bias)
            for y, linear in zip(outputs, linears, strict=True)
        )

    return project


class _Unmoved(torch.autograd.Function):
    """y, and no gradient for the bias: a parameter's gradient is awaited even where it is zero."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: nn.Parameter) -> Tensor:
        ctx.bias = bias  # not a saved tensor: what hooks give back for a parameter has lost its slot
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, plain_grad(ctx.bias, torch.zeros_like(ctx.bias))
