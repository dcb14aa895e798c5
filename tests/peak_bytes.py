"""Bytes of the tensors that are alive on a rank, counted by storage while a function runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts every storage once that an operation inside has read or made, from then on until it is freed.

    Operations of other threads are not seen: what they make counts once an operation here reads it. Storages are
    looked through only where there may be a new peak.

    Args:
        elsewhere: tensors whose memory stands for another device's.
        named: also remember where in the code the storages of the peak were made.
    """

    def __init__(self, elsewhere: Iterable[Tensor] = (), *, named: bool = False) -> None:
        super().__init__()
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._elsewhere = {x.untyped_storage()._cdata for x in elsewhere}
        self._alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._most, self._named = 0, named

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._see(x, "given")
        found = func(*args, **(kwargs or {}))
        label = self._where(func) if self._named else ""
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                self._see(x, label)
        if self._most > self.peak:
            self._most = self.now()
            if self._most > self.peak:
                self.peak = self._most
                if self._named:
                    self.at_peak = self.sizes()
        return found

    def leave_out(self, tensor: Tensor) -> None:
        """Its memory (…) stands for another device's."""
        self._elsewhere.add(tensor.untyped_storage()._cdata)

    def see(self, *tensors: Tensor) -> None:
        """Counts these (…) too."""
        for x in tensors:
            self._see(x, "given")

    def now(self) -> int:
        """Bytes that are alive."""
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        return sum(nbytes for _, nbytes, _ in self._alive.values())

    def sizes(self) -> Counter[str]:
        """Bytes that are alive, by where they were made."""
        found: Counter[str] = Counter()
        for _, nbytes, label in self._alive.values():
            found[label] += nbytes
        return found

    def reset(self) -> None:
        """From here on another peak is looked for."""
        self.peak = self._most = 0
        self.at_peak = Counter()

    def _see(self, x: Tensor, label: str) -> None:
        if x.device.type == "meta":
            return
        storage = x.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if address in self._elsewhere or (known is not None and not known[0].expired()):
            return
        self._alive[address] = StorageWeakRef(storage), storage.nbytes(), label
        self._most += storage.nbytes()

    @staticmethod
    def _where(func: Any) -> str:
        frame, names = sys._getframe(2), []
        while frame is not None and len(names) < 4:
            file = frame.f_code.co_filename
            if "/torch/" not in file and any(f"/{room}/" in file for room in ("models", "parallel", "trainer")):
                names.append(f"{file.rsplit('/', 1)[1]}:{frame.f_lineno}")
            frame = frame.f_back
        return f"{func.__name__ if hasattr(func, '__name__') else func} {' < '.join(names)}"
