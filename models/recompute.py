"""Recompute: a layer keeps its input only, and its forward runs again when its backward needs the rest."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dropout import Draws
from .sequences import Sequences
from .transformer import Layer


def run_layer_again(layer: Layer, x: Tensor, seq: Sequences, draws: Draws | None) -> Tensor:
    """x (N, h) → (N, h), a `transformer.RunLayer`.

    No random state is saved: every draw of a layer is keyed (`dropout.Draws`), so the second run makes the same ones.
    """
    y = checkpoint(layer, x, seq, draws, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y
