"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are made from one narrow latent vector per token, queries too where they are compressed.
Only a part of each head turns with the position, and the key's turning part is one for all heads:

    x ─ kv_down ─┬─ latent (r) ─ norm ─ kv_up ─▶ per head: key (n), value (e)
                 └─ rotary key (p), for all heads
    x ─ q_down ─ norm ─ q_up ─▶ per head: query (n + p)          or  x ─ q ─▶

Shapes: N = B · T tokens, H heads, r = kv_rank, n = nope_dim, p = rope_dim, e = value_dim. The tokens at the narrow
places may be fewer than N, and the heads fewer than the model's: the projections decide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..configs.schema import ModelConfig
from ..parallel.kernels.interfaces import AttentionCall, Core, LatentCore
from ..parallel.recompute import run_part
from .attention import attend
from .functional import rotate
from .linear import Linear, project
from .norms import RmsNorm
from .sequences import Sequences


def all_at_hand(x: Tensor) -> Tensor:
    """The tokens at the narrow places are all tokens."""
    return x


class LatentAttention(nn.Module):
    """Multi-head latent attention in its training form: keys and values are expanded to all heads.

    Replaceable from outside: `gather_tokens`, the rotary key (n', p) of the tokens at hand → (N, p) of all tokens; and
    `latent_core`, which expands keys and values itself, for `core`.
    """

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        mla = cfg.mla
        width = mla.nope_dim + mla.rope_dim
        self.widths = width, mla.value_dim
        """Of a query or key head, and of a value head."""
        self.mla, self.scale = mla, width**-0.5 * cfg.rope.score_factor
        self.window, self.interleaved = cfg.window_of(index), cfg.rope.interleaved
        compressed = mla.q_rank is not None
        self.q = None if compressed else Linear(cfg.hidden, cfg.heads * width)
        if mla.q_rank is not None:
            self.q_down = Linear(cfg.hidden, mla.q_rank, cfg.qkv_bias)
            self.q_norm = RmsNorm(mla.q_rank, cfg.norm_eps)
            self.q_up = Linear(mla.q_rank, cfg.heads * width)
        self.kv_down = Linear(cfg.hidden, mla.kv_rank + mla.rope_dim, cfg.qkv_bias)
        self.kv_norm = RmsNorm(mla.kv_rank, cfg.norm_eps)
        self.kv_up = Linear(mla.kv_rank, cfg.heads * (mla.nope_dim + mla.value_dim))
        self.out = Linear(cfg.heads * mla.value_dim, cfg.hidden, cfg.out_bias)
        self.gather_tokens: Callable[[Tensor], Tensor] = all_at_hand
        self.core: Core = attend
        self.rotate = rotate
        self.latent_core: LatentCore | None = None

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """x (N, h) → (N, h)."""
        q, k, v = run_part("attention", partial(self.heads, seq.batch), x, *seq.angles)
        call = AttentionCall(seq.layout, self.window, self.scale)
        if self.latent_core is not None:
            y = self.latent_core(q, k, v, self.kv_up, self.keys_values, call)
        else:
            y = self.core(q, k, v, call)
        return self.out(y.reshape(seq.batch * seq.length, -1))

    def heads(self, batch: int, x: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From x (N, h), and cosines and sines (1 or B, T, 1, p/2), what the core reads: q (B, T, H, n + p), k and v,
        or what a `latent_core` makes these of."""
        q, low = (self.q(x), self.kv_down(x)) if self.q is not None else project(x, self.q_down, self.kv_down)
        return run_part("latent", partial(self.expanded, batch), q, low, *angles)

    def expanded(self, batch: int, q: Tensor, low: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the narrow vectors: queries (N, q_rank), or whole ones; latents and rotary keys (N, r + p)."""
        if self.q is None:
            q = self.q_up(run_part("norm", self.q_norm, q))
        latent, turning = low.split((self.mla.kv_rank, self.mla.rope_dim), dim=-1)
        latent, turning = run_part("norm", self.kv_norm, latent), self.gather_tokens(turning)
        shape = (batch, len(q) // batch, -1)
        q = q.view(*shape, self.mla.nope_dim + self.mla.rope_dim)
        turning = turning.view(*shape, self.mla.rope_dim)
        if angles:
            cos, sin = angles
            q, turning = (self.rotate(y, cos, sin, self.interleaved) for y in (q, turning))
        if self.latent_core is not None:
            return q, latent, turning.squeeze(2)
        return q, *self.keys_values(self.kv_up(latent), turning.squeeze(2))

    def keys_values(self, expanded: Tensor, turning: Tensor) -> tuple[Tensor, Tensor]:
        """k (B, T, H, n + p) and v (B, T, H, e) from the expanded latents (B · T, H (n + e)) and the turned keys
        (B, T, p)."""
        widths = (self.mla.nope_dim, self.mla.value_dim)
        still, v = expanded.view(*turning.shape[:2], -1, sum(widths)).split(widths, dim=-1)
        # Heads first in memory, as attention wants them.
        parts = still.transpose(1, 2), turning[:, None].expand(-1, still.shape[2], -1, -1)
        return torch.cat(parts, dim=-1).transpose(1, 2), v
