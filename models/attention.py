"""Causal self-attention: projections, heads, rotary embedding, and the replaceable core.

Shapes: N = B · T tokens, H query heads, K key-value heads, d head width. After the projections every tensor has the
heads that its weights have, whatever part of the model's heads that is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from .blockwise import blockwise
from .functional import rotate
from .linear import Linear, project
from .masks import Mask
from .norms import RmsNorm
from .sequences import Sequences


class Core(Protocol):
    """Softmax attention: q (B, T, H, d), k (B, T, K, d) and v (B, T, K, e) → (B, T, H, e).

    `scale` multiplies the scores (none: 1 / sqrt(d)); `sinks` (H,) are scores that join each softmax of their head and
    have no value.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None, sinks: Tensor | None = None
    ) -> Tensor: ...


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The fastest core for the device, a `Core`."""
    return (sdpa if q.is_cuda else blockwise)(q, k, v, mask, scale, sinks)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """torch's fused attention, a `Core`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dense = mask.dense(q.shape[1], q.device)
    if sinks is not None:
        q, k, v = _with_sink_key(q, k, v, sinks, scale)
        dense = None if dense is None else F.pad(F.pad(dense, (0, 0, 1, 0)), (1, 0), value=True)
    shared = q.shape[2] // k.shape[2]
    if dense is not None and shared > 1:  # the fused kernels that take a mask want as many keys as queries
        k, v, shared = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2), 1
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=dense,
        is_causal=dense is None,
        scale=scale,
        enable_gqa=shared > 1,
    )
    return out.transpose(1, 2) if sinks is None else out.transpose(1, 2)[:, 1:]


def _with_sink_key(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sinks as a first key that all queries see, with the value zero, and a first query that sees only that key.

    The kernels know no sinks and do not differentiate their log-sum-exp. So heads get eight more dimensions (kernels
    want multiples of eight), zero in all keys but the sink's, where they are 1 / scale; there every query has its sink.
    """
    batch, length, _, width = q.shape
    # In bf16 1 / scale has an error of up to 0.4 %; with a second summand it has the square of that.
    inverse = torch.tensor(1 / scale, dtype=torch.float64, device=q.device)
    coarse = inverse.to(k.dtype)
    sink_key = F.pad(torch.stack((coarse, (inverse - coarse).to(k.dtype))), (width, 6))
    k = torch.cat((sink_key.expand(batch, 1, k.shape[2], -1), F.pad(k, (0, 8))), 1)
    tail = F.pad(sinks.to(q.dtype)[:, None].expand(-1, 2), (0, 6))
    q = torch.cat((q, tail.expand(batch, length, -1, -1)), -1)
    return F.pad(q, (0, 0, 0, 0, 1, 0)), k, F.pad(v, (0, 0, 0, 0, 1, 0))


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads (Ainslie et al., 2023)."""

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        assert cfg.head_dim and cfg.kv_heads
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

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """x (N, h) → (N, h)."""
        q, k, v = project(x, self.q, self.k, self.v)
        if self.norm_heads_together:
            q, k = self._norm(q, k)
        q, k, v = (y.view(seq.batch, seq.length, -1, self.head_dim) for y in (q, k, v))
        if not self.norm_heads_together:
            q, k = self._norm(q, k)
        if seq.cos is not None and seq.sin is not None:
            q, k = (rotate(y, seq.cos, seq.sin, self.interleaved) for y in (q, k))
        y = self.core(q, k, v, Mask(self.window, seq.documents), self.scale, self.sinks)
        return self.out(y.reshape(seq.batch * seq.length, -1))

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
