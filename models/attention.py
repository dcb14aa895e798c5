"""Causal self-attention: projections, heads, rotary embedding, and the replaceable core.

Shapes: N = B · T tokens, H query heads, K key-value heads, d head width. After the projections every tensor has the
heads that its weights have, whatever part of the model's heads that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from .functional import rms_norm, rotate
from .linear import Linear, project
from .norms import RmsNorm


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see: earlier ones, at most `window` back, of its own document."""

    window: int | None = None
    documents: Tensor | None = None
    """(B, T) document ids, or None for one document per sequence."""

    def dense(self, length: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, T) booleans, or None where plain causality says it all."""
        windowed = self.window is not None and self.window < length
        if not windowed and self.documents is None:
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        seen = distance >= 0
        if windowed:
            seen &= distance < self.window
        seen = seen[None, None]
        if self.documents is not None:
            seen = seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        return seen


Core = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q (B, T, H, d), k and v (B, T, K, d) → (B, T, H, d), scaled by 1 / sqrt(d)."""
    dense = mask.dense(q.shape[1], q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=dense,
        is_causal=dense is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@dataclass(frozen=True)
class Sequences:
    """What all layers know of the batch: its shape, the rotary angles and the mask."""

    batch: int
    length: int
    cos: Tensor | None
    sin: Tensor | None
    mask: Mask


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads (Ainslie et al., 2023)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.head_dim and cfg.kv_heads
        self.head_dim = cfg.head_dim
        self.q = Linear(cfg.hidden, cfg.heads * cfg.head_dim, cfg.qkv_bias)
        self.k = Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, cfg.qkv_bias)
        self.v = Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, cfg.qkv_bias)
        self.out = Linear(cfg.heads * cfg.head_dim, cfg.hidden, cfg.out_bias)
        self.q_norm = RmsNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RmsNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.core: Core = sdpa

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """x (N, h) → (N, h)."""
        q, k, v = (y.view(seq.batch, seq.length, -1, self.head_dim) for y in project(x, self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm.weight, self.q_norm.eps)
            k = rms_norm(k, self.k_norm.weight, self.k_norm.eps)
        if seq.cos is not None and seq.sin is not None:
            q, k = rotate(q, seq.cos, seq.sin), rotate(k, seq.cos, seq.sin)
        y = self.core(q, k, v, seq.mask)
        return self.out(y.reshape(seq.batch * seq.length, -1))
