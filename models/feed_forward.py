"""The dense feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
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
        self.gated = swiglu_clipped if cfg.activation == "swiglu_clipped" else swiglu
        self.approximate = "tanh" if cfg.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """x (N, h) → (N, h)."""
        if self.gate is not None:
            return self.down(self.gated(*project(x, self.gate, self.up)))
        return self.down(F.gelu(self.up(x), approximate=self.approximate))
