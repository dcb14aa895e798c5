"""A microbatch, and what all layers know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parallel.kernels.mask import TokenLayout
from .dropout import Draws


@dataclass(frozen=True)
class Inputs:
    """A microbatch, as a model reads it.

    Args:
        tokens: (B, T) token ids.
        labels: (B, T) next tokens, -1 where there is no loss; or (1 + depth, B, T), also those after them
            (`mtp.ahead`): then the prediction modules add their losses' gradients. None: logits are wanted.
        scale: factor of every token's loss.
        positions: (T,) or (B, T); none: 0 … T−1.
        documents: (B, T) document ids of packed sequences; none: one document each.
        draws: the dropout of this step; none: no dropout.
        share: this microbatch's share in the step's balancing losses; 0: evaluation.
        layout: which tokens of their sequences `tokens` are, with their documents, and who has the others; none: all of
            them, with these `documents`.
    """

    tokens: Tensor
    labels: Tensor | None = None
    scale: Tensor | float = 1.0
    positions: Tensor | None = None
    documents: Tensor | None = None
    draws: Draws | None = None
    share: float = 0.0
    layout: TokenLayout | None = None


@dataclass(frozen=True)
class Sequences:
    """The batch's shape, rotary angles, place of the tokens, and what routers need."""

    batch: int
    length: int
    cos: Tensor | None
    sin: Tensor | None
    layout: TokenLayout
    """Which tokens of the sequences these are, their documents, and who has the others."""
    rows: Tensor | None = None
    """(n,) which sequence of the batch each of this device's rows of the residual stream belongs to; mixture-of-experts
    models only."""
    share: float = 0.0
    """This microbatch's share in the step's balancing losses; 0: evaluation, in which nothing is counted."""
    kept: dict[int, Any] | None = None
    """Decisions of layers that will run again, by layer: a second run finds them here instead of deciding anew."""
    places: Tensor | None = None
    """(n,) which token of the whole microbatch each row is; mixture-of-experts models only."""

    @property
    def angles(self) -> tuple[Tensor, ...]:
        """Cosines and sines, each (1 or B, T, 1, r/2); nothing where nothing is rotated."""
        return () if self.cos is None or self.sin is None else (self.cos, self.sin)
