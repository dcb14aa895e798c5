"""Causal self-attention: projections, heads, rotary embedding, and the replaceable core.

Shapes: N = B · T tokens, H query heads, K key-value heads, d head width. After the projections every tensor has the
heads that its weights have, whatever part of the model's heads that is.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from ..parallel.kernels.attention import attention
from ..parallel.kernels.device import local_attention
from ..parallel.kernels.interfaces import AttentionCall, Core
from ..parallel.kernels.mask import Mask
from ..parallel.recompute import run_part
from .functional import rotate
from .linear import Linear, project
from .norms import RmsNorm
from .sequences import Sequences


def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """The core of one device, which has all tokens: a `Core`."""
    mask = call.layout.once(Mask.of, call.layout.mine, call.window)
    return attention(local_attention(q.device), q, k, v, mask, call.scale, call.sinks)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads (Ainslie et al., 2023)."""

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        self.window, self.interleaved = cfg.window_of(index), cfg.rope.interleaved
        self.head_dim, self.scale = cfg.head_dim, cfg.head_dim**-0.5 * cfg.rope.score_factor
        queries, keys = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q = Linear(cfg.hidden, queries, cfg.qkv_bias)
        self.k = Linear(cfg.hidden, keys, cfg.qkv_bias)
        self.v = Linear(cfg.hidden, keys, cfg.qkv_bias)
        self.out = Linear(queries, cfg.hidden, cfg.out_bias)
        whole = cfg.qk_norm_whole
        self.q_norm = RmsNorm(queries if whole else cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RmsNorm(keys if whole else cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.norm_heads_together = whole
        self.sinks = nn.Parameter(torch.empty(cfg.heads)) if cfg.sinks else None
        self.core: Core = attend
        self.rotate = rotate

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """x (N, h) → (N, h)."""
        q, k, v = run_part("attention", partial(self.heads, seq.batch), x, *seq.angles)
        y = self.core(q, k, v, AttentionCall(seq.layout, self.window, self.scale, self.sinks))
        return self.out(y.reshape(seq.batch * seq.length, -1))

    def heads(self, batch: int, x: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, d), k and v (B, T, K, d) from x (N, h) and cosines and sines, each (1 or B, T, 1, r/2)."""
        q, k, v = project(x, self.q, self.k, self.v)
        if self.norm_heads_together:
            q, k = self._norm(q, k)
        q, k, v = (y.view(batch, len(y) // batch, -1, self.head_dim) for y in (q, k, v))
        if not self.norm_heads_together:
            q, k = self._norm(q, k)
        if angles:
            cos, sin = angles
            q, k = (self.rotate(y, cos, sin, self.interleaved) for y in (q, k))
        return q, k, v

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
