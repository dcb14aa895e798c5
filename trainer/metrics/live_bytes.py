"""How many bytes a rank's tensors take on its device, at any moment of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Births(TorchDispatchMode):
    """Sees every storage that an operator of the thread makes: an output's that is none of its inputs'."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if _is_plain(each)}
        for each in tree_leaves(result):
            if _is_plain(each) and each.device.type == self._device.type:
                storage = each.untyped_storage()
                if storage._cdata not in known and storage.nbytes():
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


class LiveBytes:
    """Bytes of the tensors that were made since a step began and are still there, with what outlived steps before.

    On CUDA the allocator knows them. On a CPU every operator's new storages are noted and looked at again whenever they
    are counted, which makes a step slower; tensors that other threads make are not seen there.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._births = device, _Births(device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A step."""
        if self._device.type == "cuda":
            yield
            return
        with self._births:
            yield

    def count(self) -> int:
        """The bytes now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        alive = self._births.alive
        for gone in [key for key, (storage, _) in alive.items() if storage.expired()]:
            del alive[gone]
        return sum(nbytes for _, nbytes in alive.values())
