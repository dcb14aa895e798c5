"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Module k reads what module k − 1 made of token i (the first: what the last layer made of it) and the embedding of token
i + k, and predicts token i + k + 1 with the model's own head:

    h_k(i) = layer([norm(h_{k−1}(i)); norm(embed(t_{i+k}))] Wᵀ)        loss = λ / D · Σ_k cross-entropy_k
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from .linear import Linear
from .norms import make_norm


class Prediction(nn.Module):
    """What one module has around its layer.

    Args:
        cfg: the model.
        layer: a transformer layer.
    """

    def __init__(self, cfg: ModelConfig, layer: nn.Module) -> None:
        super().__init__()
        self.hidden_norm = make_norm(cfg)
        self.embed_norm = make_norm(cfg)
        self.project = Linear(2 * cfg.hidden, cfg.hidden)
        self.layer = layer
        self.norm = make_norm(cfg)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The layer's input (n, h) from the hidden states (n, h) and the next tokens' embeddings (n, h)."""
        return self.project(torch.cat((self.hidden_norm(hidden), self.embed_norm(embedded)), -1))


def ahead(labels: Tensor, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For k = 1 … depth: the tokens t_{i+k} that are read and the labels t_{i+k+1}, both (B, T).

    Args:
        labels: (B, T) next tokens t_{i+1}, -1 where there is none. A position with a gap ahead of it has no label, as
            what follows is another document.
    """
    known = labels >= 0
    current = labels
    for _ in range(depth):
        following = torch.full_like(labels, -1)
        following[:, :-1] = current[:, 1:]
        following = torch.where(known, following, -1)
        yield torch.where(known, current, 0), following
        known, current = following >= 0, following
