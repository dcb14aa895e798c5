"""How the tensors of a Hugging Face folder and our parameters are made of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...parallel.global_tensor import Placement

Shape = tuple[int, ...]
Read = Callable[[str, tuple[slice, ...]], Tensor]
"""Part of a Hugging Face tensor: its name and one slice per dimension → the tensor."""


class Link(Protocol):
    """Some Hugging Face tensors and the parameters of ours that hold the same numbers."""

    @property
    def ours(self) -> dict[str, Shape]:
        """Names and shapes of our parameters."""
        ...

    @property
    def theirs(self) -> dict[str, Shape]:
        """Names and shapes of the Hugging Face tensors."""
        ...

    def to_ours(self, name: str, placement: Placement, read: Read) -> Tensor:
        """A slice of one of our parameters, of shape `placement.local_shape` (n, …), reading no more than that."""
        ...

    def to_theirs(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors, contiguous, out of our parameters."""
        ...


@dataclass(frozen=True)
class Joined:
    """One Hugging Face tensor: `parts` (name and shape) joined along `dim`, then its last two dims swapped if
    `transposed`. `interleaved`: the parts' elements along `dim` take turns instead of following one another."""

    name: str
    parts: tuple[tuple[str, Shape], ...]
    transposed: bool = False
    dim: int = 0
    interleaved: bool = False

    @property
    def ours(self) -> dict[str, Shape]:
        """Names and shapes of our parameters."""
        return dict(self.parts)

    @property
    def theirs(self) -> dict[str, Shape]:
        """Name and shape of the Hugging Face tensor."""
        sizes = list(self.parts[0][1])
        sizes[self.dim] = sum(shape[self.dim] for _, shape in self.parts)
        return {self.name: _swapped(tuple(sizes)) if self.transposed else tuple(sizes)}

    def to_ours(self, name: str, placement: Placement, read: Read) -> Tensor:
        """A slice of one of our parameters, of shape `placement.local_shape` (n, …), reading no more than that
        (interleaved: its neighbours too)."""
        names = [part for part, _ in self.parts]
        which, count = names.index(name), len(names)
        index = _index(placement)
        first, last = index[self.dim].start, index[self.dim].stop
        if self.interleaved:
            index[self.dim] = slice(first * count, last * count)
        else:
            before = sum(shape[self.dim] for _, shape in self.parts[:which])
            index[self.dim] = slice(before + first, before + last)
        tensor = read(self.name, _swapped(tuple(index)) if self.transposed else tuple(index))
        tensor = tensor.mT if self.transposed else tensor
        return tensor.unflatten(self.dim, (-1, count)).select(self.dim + 1, which) if self.interleaved else tensor

    def to_theirs(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensor (n, …), contiguous, out of our parameters, which it joins along `dim`."""
        tensors = [ours[name] for name, _ in self.parts]
        if self.interleaved:
            joined = torch.stack(tensors, self.dim + 1).flatten(self.dim, self.dim + 1)
        else:
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, self.dim)
        yield self.name, (joined.mT if self.transposed else joined).contiguous()


@dataclass(frozen=True)
class Stacked:
    """Hugging Face tensors, one per expert, that are our parameter's slices along dim 0."""

    names: tuple[str, ...]
    ours_name: str
    shape: Shape
    """Of our parameter."""

    @property
    def ours(self) -> dict[str, Shape]:
        """Name and shape of our parameter."""
        return {self.ours_name: self.shape}

    @property
    def theirs(self) -> dict[str, Shape]:
        """Names and shapes of the Hugging Face tensors."""
        return dict.fromkeys(self.names, self.shape[1:])

    def to_ours(self, name: str, placement: Placement, read: Read) -> Tensor:
        """A slice (experts, out, in) of our parameter; other experts' tensors are not read."""
        experts, *rest = _index(placement)
        out = None
        for i, expert in enumerate(self.names[experts]):
            one = read(expert, tuple(rest))
            out = one.new_empty(placement.local_shape) if out is None else out
            out[i] = one
        return torch.empty(placement.local_shape) if out is None else out

    def to_theirs(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors (out, in), contiguous, out of our parameter (experts, out, in)."""
        for name, expert in zip(self.names, ours[self.ours_name], strict=True):
            yield name, expert.contiguous()


def _swapped(sizes: tuple) -> tuple:
    return (*sizes[:-2], sizes[-1], sizes[-2])


def _index(placement: Placement) -> list[slice]:
    return [slice(at, at + size) for at, size in zip(placement.offsets, placement.local_shape, strict=True)]
