"""What autograd saves in a forward pass, on its way into the graph and out of it.

torch applies the innermost pair of saved-tensor hooks alone. Keepers that are opened inside each other know each other
instead: what one has no better place for it gives to the one around it. So a layer's keeper drops what will be made
again, and what it is made from goes on to the keeper of the stage, which may take it to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Keeper(Protocol):
    """Where saved tensors are until backward needs them."""

    def pack(self, tensor: Tensor) -> Any:
        """What the graph holds in place of a tensor (…)."""
        ...

    def unpack(self, held: Any) -> Tensor:
        """The tensor (…) for which `pack` returned `held`."""
        ...


def without_history(tensor: Tensor) -> Tensor:
    """The tensor (…) as a keeper may hold it: a node that holds an output of its own by name of its history holds
    itself, and goes only if it runs. Parameters stay what they are."""
    return tensor if tensor.grad_fn is None else tensor.detach()


class _InTheGraph:
    """Tensors stay where autograd saves them."""

    def pack(self, tensor: Tensor) -> Tensor:
        return without_history(tensor)

    def unpack(self, held: Tensor) -> Tensor:
        return held


_IN_THE_GRAPH = _InTheGraph()
_INNERMOST: ContextVar[Keeper] = ContextVar("innermost", default=_IN_THE_GRAPH)
"""As deep as torch's own stack of hooks, of which each thread has one too."""


def innermost() -> Keeper:
    """The keeper of what a forward pass saves here."""
    return _INNERMOST.get()


@contextmanager
def keeping(keeper: Keeper) -> Iterator[None]:
    """A forward pass inside this block saves with `keeper`."""
    token = _INNERMOST.set(keeper)
    try:
        with saved_tensors_hooks(keeper.pack, keeper.unpack):
            yield
    finally:
        _INNERMOST.reset(token)


@dataclass(frozen=True, slots=True)
class Strided:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Strided:
        """Of any strided tensor (…)."""
        return Strided(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor, `shape` (…), that lies like this in a storage."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)
