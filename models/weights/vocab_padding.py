"""Rows that the vocabulary's tables have beyond the token ids in use: zeros from outside, cut on the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...configs.schema import ModelConfig
from ...parallel.global_tensor import Placement

Read = Callable[[str, Placement], Tensor]
"""A parameter's name and a slice of it → the slice."""

_TABLES = ("embed.weight", "head.weight")


def padded_read(read: Read, given: ModelConfig) -> Read:
    """`read` for a model with the same ids in use, whose tables may have other padding.

    Args:
        read: of the weights that there are.
        given: their model.
    """

    def part(name: str, placement: Placement) -> Tensor:
        if name not in _TABLES or placement.global_shape[0] == given.vocab:
            return read(name, placement)
        width = placement.global_shape[1:]
        known = max(0, min(placement.offsets[0] + placement.local_shape[0], given.used_vocab) - placement.offsets[0])
        if not known:
            return torch.zeros(placement.local_shape)
        shape, local = (given.vocab, *width), (known, *placement.local_shape[1:])
        found = read(name, Placement(shape, placement.offsets, local))
        return torch.cat((found, found.new_zeros(placement.local_shape[0] - known, *placement.local_shape[1:])))

    return part


def without_padding(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model with a vocabulary of the ids in use, and its parameters; views of `tensors`."""
    cut = {name: tensor[: config.used_vocab] if name in _TABLES else tensor for name, tensor in tensors.items()}
    return replace(config, vocab=config.used_vocab, vocab_used=None), cut
