"""The mixture-of-experts layer.

Shapes: n tokens, K experts per token, R = rows that the experts of this device get, E experts on it, f inner width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from ..parallel.expert.dispatch import Dispatcher
from ..parallel.expert.make import local_dispatcher
from ..parallel.grouped_projection import Groups, Local, RecomputedInput
from ..parallel.recompute import run_part
from .dropout import Draws
from .feed_forward import FeedForward, activation_of
from .linear import GroupedLinear, Linear, project_grouped
from .routing.router import Router
from .sequences import Sequences


class Experts(nn.Module):
    """Feed-forward networks side by side, each for its own rows."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        moe, h = cfg.moe, cfg.hidden
        f = moe.ffn
        gated = cfg.activation.startswith("swiglu")
        self.gate = GroupedLinear(moe.experts, h, f, moe.bias) if gated else None
        self.up = GroupedLinear(moe.experts, h, f, moe.bias)
        self.down = GroupedLinear(moe.experts, f, h, moe.bias)
        for linear in (self.gate, self.up, self.down):
            if linear is not None:
                linear.apply_weights = Local(moe.compute)
        self.activation = activation_of(cfg)

    def forward(self, rows: Tensor, groups: Groups, weights: Tensor | None = None) -> Tensor:
        """rows (R, h), expert by expert → (R, h), multiplied by weights (R,) where these are given.

        Of (R, f) tensors only the outputs of gate and up are kept: the activation, weighted or not, is made again.
        """
        before = run_part("moe", partial(self.wide, groups), rows)
        return self.down(RecomputedInput(self.activation, before, weights), groups)

    def wide(self, groups: Groups, rows: Tensor) -> tuple[Tensor, ...]:
        """What the activation reads of rows (R, h), each (R, f): gate and up, or up alone."""
        return project_grouped(rows, groups, *(() if self.gate is None else (self.gate,)), self.up)


class Moe(nn.Module):
    """Routed experts, and a shared one that every token passes (DeepSeekMoE, arXiv 2401.06066)."""

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        moe = cfg.moe
        self.router = Router(cfg, index)
        self.experts = Experts(cfg)
        self.shared = FeedForward(cfg, moe.shared) if moe.shared else None
        self.shared_gate = Linear(cfg.hidden, 1) if moe.shared and moe.shared_gate else None
        self.dispatch: Dispatcher = local_dispatcher(moe)

    def forward(self, x: Tensor, seq: Sequences, draws: Draws | None = None) -> Tensor:
        """x (n, h) → (n, h)."""
        routing = self.router(x, seq, draws)
        y, shared = self.dispatch(x, routing, self.experts, lambda: self._shared(x))
        return y if shared is None else y + shared

    def _shared(self, x: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        y = self.shared(x)
        return y if self.shared_gate is None else y * torch.sigmoid(self.shared_gate(x))
