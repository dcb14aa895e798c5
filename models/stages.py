"""The model as stages of a pipeline: what each stage computes."""

from __future__ import annotations

import torch
from torch import Tensor

from .costs.parts import StageSplit
from .sequences import Inputs, Sequences
from .transformer import Transformer


def run_stage(
    model: Transformer,
    split: StageSplit,
    stage: int,
    x: Tensor | None,
    inputs: Inputs,
    dtype: torch.dtype,
    seq: Sequences | None = None,
) -> Tensor:
    """The output of a stage (N, h); from a last stage that has the head, the loss (a scalar).

    Args:
        x: the output of the stage before (N, h); of the first stage the embedding's rows where the vocabulary is
            balanced, else none.
        dtype: of the hidden states.
        seq: what layers know of the microbatch; none: it is computed.
    """
    last = len(split.layers) - 1
    if last == 0 and not split.balanced:
        return model(inputs)
    if stage == 0:
        x = model.embed_tokens(inputs) if x is None else model.begin(x, inputs)
    assert x is not None
    seq = model.sequences(inputs, dtype) if seq is None else seq
    x = model.run_layers(x, seq, inputs.draws, split.layers[stage])
    if stage < last:
        return x
    return model.end(x) if split.balanced else model.loss(x, seq, inputs)
