"""Recompute: a layer keeps its input only, and its forward runs again when its backward needs the rest."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dropout import Draws
from .sequences import Sequences
from .transformer import Layer


def run_layer_again(layer: Layer, x: Tensor, seq: Sequences, draws: Draws | None) -> Tensor:
    """x (N, h) → (N, h), a `transformer.RunLayer`.

    The graph is that of the first run; the second one only fills in the tensors that it needs. No random state is
    saved: every draw of a layer is keyed (`dropout.Draws`), so the second run makes the same ones. What a router
    decides is kept (`Sequences.kept`), for it could turn on the last bit of a score, and neither counted nor
    agreed on twice.
    """
    if layer.moe is not None:
        seq = replace(seq, kept={})
    y = checkpoint(layer, x, seq, draws, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y
