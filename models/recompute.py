"""Recompute: what of each layer is not kept for its backward pass, and so runs again in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..parallel.recompute import remaking, run_again
from .costs.kept import Choice, SomeTokens
from .dropout import Draws
from .sequences import Sequences
from .transformer import Layer


@dataclass(frozen=True)
class RunLayers:
    """A `transformer.RunLayer` of a model whose layers are made again as a whole or in parts.

    Args:
        remade: of each layer, by index; a layer that it lacks keeps everything.
    """

    remade: Mapping[int, Choice]

    def __call__(self, layer: Layer, x: Tensor, seq: Sequences, draws: Draws | None) -> Tensor:
        """x (N, h) → (N, h)."""
        choice = self.remade.get(layer.index, "none")
        if choice == "none" or not torch.is_grad_enabled():
            return layer(x, seq, draws)
        if choice == "full":
            # What a router decides is kept: it could turn on the last bit of a score, and is counted once.
            seq = replace(seq, kept={}) if layer.moe is not None else seq
            return run_again(partial(_run, layer, seq, draws), x, name=f"layer {layer.index}")
        some = isinstance(choice, SomeTokens)
        parts = choice.parts if some else frozenset(choice)
        with remaking(parts, dict.fromkeys(choice.cut, choice.blocks) if some else {}, f"layer {layer.index}"):
            return layer(x, seq, draws)


def _run(layer: Layer, seq: Sequences, draws: Draws | None, x: Tensor) -> Tensor:
    return layer(x, seq, draws)
