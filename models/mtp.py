"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Module k reads what module k − 1 made of token i (the first: what the last layer made of it) and the embedding of token
i + k, and predicts token i + k + 1 with the model's own head:

    h_k(i) = layer([norm(h_{k−1}(i)); norm(embed(t_{i+k}))] Wᵀ)        loss = λ / D · Σ_k cross-entropy_k
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from ..parallel.labels import IGNORED
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


def ahead(labels: Tensor, depth: int) -> Tensor:
    """(1 + depth, B, T): the tokens t_{i+1}, t_{i+2}, … that follow each token, -1 where there is none.

    Module k reads the k-th of them and predicts the one after it.

    Args:
        labels: (B, T) of whole sequences, the next tokens t_{i+1}. What comes after a gap is another document.
        depth: how many modules there are.
    """
    found = [labels]
    for _ in range(depth):
        following = torch.full_like(labels, IGNORED)
        following[:, :-1] = found[-1][:, 1:]
        found.append(torch.where(found[-1] != IGNORED, following, IGNORED))
    return torch.stack(found)
