"""The model as stages of a pipeline: what each stage computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.kernels.mask import TokenLayout
from .costs.parts import Split
from .dropout import Draws
from .transformer import Transformer


@dataclass(frozen=True)
class Inputs:
    """What every stage knows of a microbatch; arguments as of `Transformer.forward`."""

    tokens: Tensor
    labels: Tensor
    scale: float
    positions: Tensor | None = None
    documents: Tensor | None = None
    draws: Draws | None = None
    share: float = 0.0
    layout: TokenLayout | None = None


def run_stage(
    model: Transformer, split: Split, stage: int, x: Tensor | None, inputs: Inputs, dtype: torch.dtype
) -> Tensor:
    """The output of a stage (N, h); from a last stage that has the head, the loss (a scalar).

    Args:
        x: the output of the stage before (N, h); of the first stage the embedding's rows where the vocabulary is
            balanced, else none.
        dtype: of the hidden states.
    """
    last = len(split.layers) - 1
    tokens, positions, draws = inputs.tokens, inputs.positions, inputs.draws
    if last == 0 and not split.balanced:
        return model(
            tokens,
            inputs.labels,
            scale=inputs.scale,
            positions=positions,
            documents=inputs.documents,
            draws=draws,
            share=inputs.share,
            layout=inputs.layout,
        )
    if stage == 0:
        x = model.embed_tokens(tokens, positions, draws) if x is None else model.begin(x, tokens, positions, draws)
    assert x is not None
    seq = model.sequences(tokens, positions, inputs.documents, dtype, inputs.share, inputs.layout)
    x = model.run_layers(x, seq, draws, split.layers[stage])
    if stage < last:
        return x
    return model.end(x) if split.balanced else model.loss(x, seq, draws, inputs.labels, inputs.scale)
