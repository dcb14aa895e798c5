"""Causal self-attention: projections, heads, rotary embedding, and the replaceable core.

Shapes: N = B · T tokens, H query heads, K key-value heads, d head width. After the projections every tensor has the
heads that its weights have, whatever part of the model's heads that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from .blockwise import blockwise
from .functional import rms_norm, rotate
from .linear import Linear, project
from .masks import Mask
from .norms import RmsNorm

Core = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The fastest core for the device: q (B, T, H, d), k and v (B, T, K, d) → (B, T, H, d)."""
    return sdpa(q, k, v, mask) if q.is_cuda else blockwise(q, k, v, mask)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """torch's fused attention, scaled by 1 / sqrt(d)."""
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
        self.core: Core = attend

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
