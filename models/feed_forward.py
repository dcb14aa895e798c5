"""The dense feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from ..parallel.recompute import run_part
from .functional import swiglu, swiglu_clipped
from .linear import Linear, project


class FeedForward(nn.Module):
    """Two layers, the first of them gated with the swiglus.

    Args:
        cfg: the model.
        width: inner width; none: model.ffn.
    """

    def __init__(self, cfg: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = cfg.ffn if width is None else width
        gated = cfg.activation.startswith("swiglu")
        self.gate = Linear(cfg.hidden, width, cfg.ffn_bias) if gated else None
        self.up = Linear(cfg.hidden, width, cfg.ffn_bias)
        self.down = Linear(width, cfg.hidden, cfg.ffn_bias)
        self.activation = activation_of(cfg)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, h) → (N, h)."""
        return self.down(run_part("activation", self.activation, *run_part("ffn", self.wide, x)))

    def wide(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the activation reads, each (N, f): gate and up, or up alone."""
        return project(x, *(() if self.gate is None else (self.gate,)), self.up)


def activation_of(cfg: ModelConfig) -> Callable[..., Tensor]:
    """The activation function of gate and up, or of up alone, each (N, f) → (N, f)."""
    if cfg.activation.startswith("swiglu"):
        return swiglu_clipped if cfg.activation == "swiglu_clipped" else swiglu
    return partial(F.gelu, approximate="tanh" if cfg.activation == "gelu_tanh" else "none")
