"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from .functional import Total, rms_norm


class RmsNorm(nn.Module):
    """RMSNorm over the last dim.

    `total` is replaceable from outside: where weight and input have only a part of the dim, it makes the sums over all
    of it. So is `kernel`, which normalises rows that are whole.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size))
        self.total: Total | None = None
        self.kernel: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, size) → (…, size)."""
        if self.kernel is not None and self.total is None:
            return self.kernel(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, self.size, self.total)


class LayerNorm(nn.Module):
    """LayerNorm with bias over the last dim; `kernel` is replaceable from outside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.kernel: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, size) → (…, size)."""
        if self.kernel is not None:
            return self.kernel(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(cfg: ModelConfig) -> RmsNorm | LayerNorm:
    """The norm that the config names, over the residual stream."""
    return RmsNorm(cfg.hidden, cfg.norm_eps) if cfg.norm == "rms" else LayerNorm(cfg.hidden, cfg.norm_eps)
