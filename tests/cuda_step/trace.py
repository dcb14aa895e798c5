"""What a training step asks of a GPU, told without one: every kernel, its bytes and FLOPs, and where the host waits.

The step runs on meta tensors, which have shapes and no values, and which say here that they are on CUDA, so that the
code takes its way for GPUs. What would need a value (an item, a list, an index by a mask) is what makes a host wait for
its GPU: it is written down with its place, and answered from what the test gives.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pentad.parallel.kernels import device, upload, weight_products
from pentad.parallel.kernels.triton.operators import LAUNCHES

_NO_KERNEL = {
    "view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "_unsafe_view", "alias",
    "detach", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "unfold", "diagonal",
    "lift_fresh", "is_pinned", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_",
    "view_as_real", "view_as_complex", "chunk", "narrow",
}  # fmt: skip
"""Views and allocations."""


@dataclass(frozen=True)
class Kernel:
    """One launch: the operator, the file and function that asked for it, its FLOPs, and the bytes read and written."""

    name: str
    place: str
    flops: int
    nbytes: int
    type: torch.dtype


@dataclass
class Trace:
    """What a step did."""

    kernels: list[Kernel] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)
    """`why @ place` of each time when the host waits for the device."""


def place() -> str:
    """`module:function` of the innermost frame in the rooms."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("pentad."):
            return f"{name.removeprefix('pentad.')}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"


class _Log(TorchDispatchMode):
    def __init__(self, trace: Trace, pinned: dict[int, Tensor]) -> None:
        super().__init__()
        self._trace, self._pinned = trace, pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in (*given, *made)):
            return out
        if name in ("_to_copy", "copy_"):
            self._copied(name, given, made, kwargs, args)
        if name not in _NO_KERNEL:
            flops, kind = _flops(name, given), (made or given)[0].dtype
            for _ in range(LAUNCHES.get(name, 1)):
                self._trace.kernels.append(Kernel(name, place(), flops, _nbytes(name, given, made), kind))
        return out

    def _copied(self, name: str, given: list[Tensor], made: list[Tensor], kwargs: Any, args: Any) -> None:
        source = given[1] if name == "copy_" and len(given) > 1 else given[0]
        target = given[0] if name == "copy_" else made[0]
        if source.is_meta == target.is_meta:
            return
        free = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        way = "to the device" if target.is_meta else "to the host"
        if not free:
            self._trace.waits[f"copy {way} @ {place()}"] += 1
        elif not target.is_meta or source.untyped_storage().data_ptr() not in self._pinned:
            self._trace.waits[f"copy {way} of pageable memory @ {place()}"] += 1


def _nbytes(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    def size(x: Tensor) -> int:
        count = 1
        for length, stride in zip(x.shape, x.stride(), strict=True):
            count *= length if stride else 1
        return count * x.element_size()

    if name in ("fill_", "zero_", "zeros", "ones", "full", "arange"):
        given = []
    return sum(map(size, given)) + sum(map(size, made))


def _flops(name: str, given: list[Tensor]) -> int:
    """Of matrix products, 2 a multiplication."""
    if name in ("mm", "bmm", "_grouped_mm"):
        a, b = given[:2]
    elif name in ("addmm", "addmm_", "baddbmm_", "baddbmm"):
        a, b = given[1:3]
    else:
        return 0
    return 2 * a.numel() * b.shape[-1]


class _Event:
    """Of a device that has always done what was queued."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


Answer = Callable[[Tensor, str], Any]


def _no_answer(x: Tensor, where: str) -> Any:
    raise AssertionError(f"{where} wants to know the values of a tensor {tuple(x.shape)} on the device")


@contextlib.contextmanager
def tracing(answer: Answer = _no_answer) -> Iterator[Trace]:
    """Inside the block meta tensors say that they are on CUDA, and what is done with them is written down.

    Args:
        answer: the value of a tensor, as `tolist` gives it, for a host that waits for it at a place.
    """
    trace, pinned = Trace(), dict[int, Tensor]()
    plain_tolist, plain_item = Tensor.tolist, Tensor.item

    def tolist(self: Tensor) -> Any:
        if not self.is_meta:
            return plain_tolist(self)
        trace.waits[f"tolist @ {place()}"] += 1
        return answer(self, place())

    def item(self: Tensor) -> Any:
        if not self.is_meta:
            return plain_item(self)
        trace.waits[f"item @ {place()}"] += 1
        return answer(self, place())

    def pin_memory(self: Tensor, *_: Any) -> Tensor:
        copy = self.clone()
        pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    with ExitStack() as patches:
        for name, value in {"tolist": tolist, "item": item, "pin_memory": pin_memory}.items():
            patches.enter_context(patch.object(Tensor, name, value))
        on_device = property(lambda self: self.device.type in ("meta", "cuda"))
        patches.enter_context(patch.object(Tensor, "is_cuda", on_device))
        patches.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        patches.enter_context(patch.object(device, "packs", lambda *_: True))
        patches.enter_context(patch.object(upload, "_page_locked", torch.empty_like))
        patches.enter_context(patch.object(torch.cuda, "Event", _Event))
        patches.enter_context(patch.object(weight_products, "_EXACT", frozenset({"cuda", "meta"})))
        patches.enter_context(_Log(trace, pinned))
        yield trace
