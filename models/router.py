"""Routers: which experts a token goes to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from ..parallel.expert.routing import Routing
from ..parallel.expert.tokens import TokenGroup
from ..parallel.mesh import Axis
from .dropout import Draws
from .sequences import Sequences


class Router(nn.Module):
    """Scores every expert for every token and picks."""

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        moe = cfg.moe
        self.cfg, self.index = moe, index
        choices = moe.experts + moe.router.null_experts
        self.weight = nn.Parameter(torch.empty(choices, cfg.hidden))
        self.bias = nn.Parameter(torch.empty(choices)) if moe.router.logit_bias else None
        self.tokens = TokenGroup(Axis.single("tokens"))

    def forward(self, x: Tensor, seq: Sequences, draws: Draws | None = None) -> Routing:
        """x (n, h) → the routing of n tokens."""
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = F.linear(x.to(precise), self.weight.to(precise))
        scores = torch.softmax(logits, -1)
        experts = scores.detach().topk(self.cfg.top_k, -1).indices
        weights = scores.gather(-1, experts)
        return Routing(experts, weights / weights.sum(-1, keepdim=True))
