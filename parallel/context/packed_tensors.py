"""Tensors that travel together, as one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Like:
    """Shape and type of a tensor (B, n, …) of a parcel, but for its rows.

    Args:
        batch: B.
        rest: the sizes after n.
        dtype: its type.
    """

    batch: int
    rest: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor, dtype: torch.dtype | None = None) -> Like:
        """As x, or in another type."""
        return Like(x.shape[0], tuple(x.shape[2:]), dtype or x.dtype)


@dataclass(frozen=True)
class PackedTensors:
    """Tensors one after the other in one buffer.

    Args:
        buffer: flat, of their type, or of bytes where they have several.
        parts: views of it.
    """

    buffer: Tensor
    parts: tuple[Tensor, ...]

    @staticmethod
    def empty(likes: Sequence[Like], count: int, device: torch.device) -> PackedTensors:
        """For tensors of `count` rows; those of wide types first, so that each stands at a multiple of its width."""
        kinds = {like.dtype for like in likes}
        kind = kinds.pop() if len(kinds) == 1 else torch.uint8
        shapes = [(like.batch, count, *like.rest) for like in likes]
        sizes = [prod(shape) * like.dtype.itemsize // kind.itemsize for shape, like in zip(shapes, likes, strict=True)]
        buffer = torch.empty(sum(sizes), dtype=kind, device=device)
        parts = tuple(
            part.view(like.dtype).view(shape)
            for part, shape, like in zip(buffer.split(sizes), shapes, likes, strict=True)
        )
        return PackedTensors(buffer, parts)

    @staticmethod
    def of(*tensors: Tensor) -> PackedTensors:
        """A copy of tensors (B, n, …)."""
        parcel = PackedTensors.empty([Like.of(x) for x in tensors], tensors[0].shape[1], tensors[0].device)
        for part, x in zip(parcel.parts, tensors, strict=True):
            part.copy_(x)
        return parcel
