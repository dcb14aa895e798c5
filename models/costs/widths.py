"""How wide one rank's part of a layer is, and what of a microbatch it works on. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...configs import ModelConfig
from .parameters import active_experts


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Of one rank's part: of all its heads together, of networks, of the vocabulary."""

    heads: int
    """Query heads."""
    q: int
    """Their queries."""
    kv: int
    """Keys, or values, of all key-value heads."""
    value: int
    """All heads' results."""
    ffn: int
    shared: int
    expert: int
    vocab: int

    @staticmethod
    def of(model: ModelConfig, tp: int, etp: int = 1) -> Widths:
        """Of a resolved model."""
        kv_heads, head_dim, heads = model.kv_heads, model.head_dim, model.heads // tp
        mla = model.mla
        q = heads * (mla.nope_dim + mla.rope_dim if mla.kv_rank else head_dim)
        # Fewer key heads than ranks: each rank keeps a copy of one.
        return Widths(
            heads=heads,
            q=q,
            kv=max(1, kv_heads // tp) * head_dim,
            value=heads * mla.value_dim if mla.kv_rank else q,
            ffn=model.ffn // tp,
            shared=model.moe.shared // tp,
            expert=model.moe.ffn // etp,
            vocab=model.vocab // tp,
        )


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """One microbatch as the layers of one rank work on it.

    Args:
        sequences: B.
        tokens: of all of them that projections see here, N = B · T / cp; the residual stream has n = N / tp.
        width: bytes of an element.
        tp, etp: ranks that share each matrix, each expert's matrix.
        ranks: of the experts, ep · etp.
        exchanged: context ranks that exchange heads for tokens (ulysses, usp); 1: none.
        latents: context ranks gather latents (`ContextMethod.latent_core`).
        by_head: attention's result comes head by head, and is copied into the order of the tokens.
        rows: what the experts of this rank get; none: as many as at even load.
        sent: what this rank's tokens send to experts; none: what they choose.
    """

    sequences: int
    tokens: int
    width: int
    tp: int = 1
    etp: int = 1
    ranks: int = 1
    exchanged: int = 1
    latents: bool = False
    by_head: bool = False
    rows: int | None = None
    sent: int | None = None

    @property
    def precise(self) -> int:
        """Bytes of an element of what is computed in fp32 at least."""
        return max(4, self.width)

    @property
    def stream(self) -> int:
        """Tokens of the residual stream, n."""
        return self.tokens // self.tp

    def expert_rows(self, model: ModelConfig) -> int:
        """Rows of the experts of this rank."""
        return round(self._even(model) * self.etp) if self.rows is None else self.rows

    def sent_rows(self, model: ModelConfig) -> int:
        """Rows that leave this rank and come back."""
        return round(self._even(model)) if self.sent is None else self.sent

    def _even(self, model: ModelConfig) -> float:
        moe = model.moe
        padded = moe.capacity_factor if moe.pad and moe.capacity_factor else 1.0
        return self.stream * active_experts(model) * padded
