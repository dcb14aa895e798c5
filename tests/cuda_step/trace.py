"""What a training step asks of a GPU, told without one: every kernel, its bytes and FLOPs, and where the host waits.

The step runs on meta tensors, which have shapes and no values, and which say here that they are on CUDA, so that the
code takes its way for GPUs. What would need a value (an item, a list, an index by a mask) is what makes a host wait for
its GPU: it is written down with its place, and answered from what the test gives.
"""

from __future__ import annotations

import contextlib
import math
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
    """One launch.

    Args:
        name: of the operator; one of several kernels starts it again, with no work and no bytes.
        place: module and function that asked for it.
        kind: "product", "fp32 product" (of operands of that type), "attention", "attention backward" or "memory".
        flops: of products, and of attention to what is seen.
        nbytes: read and written.
        type: of what it makes.
    """

    name: str
    place: str
    kind: str
    flops: float
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
            dtype, where = (made or given)[0].dtype, place()
            kind, flops = _work(name, given, args)
            self._trace.kernels.append(Kernel(name, where, kind, flops, _nbytes(func, args, kwargs, made), dtype))
            more = LAUNCHES.get(name, 1) - 1
            self._trace.kernels.extend([Kernel(name, where, "memory", 0, 0, dtype)] * more)
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


_UNREAD = {"fill_", "zero_", "copy_", "random_", "bernoulli_", "normal_", "uniform_"}
"""Operators that write over their first argument."""


def _nbytes(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """Read and written, each tensor once, of expanded dims one element; of rows that are picked, those."""

    def size(*tensors: Tensor) -> int:
        return sum(math.prod(n if step else 1 for n, step in zip(x.shape, x.stride(), strict=True)) * x.element_size()
                   for x in tensors)  # fmt: skip

    name = func._schema.name.removeprefix("aten::")
    read, written = [], list(made)
    for index, argument in enumerate(func._schema.arguments):
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += [x for x in tensors if not any(x is other for other in made)]
        if not (changed and (argument.name == "out" or name in _UNREAD)):
            read += tensors
    if name in ("embedding", "index_select", "gather"):
        return 2 * size(*made) + size(read[-1])
    if name in ("index_add_", "scatter_add", "scatter_add_"):
        return 4 * size(read[-1])
    return size(*read) + size(*written)


def _work(name: str, given: list[Tensor], args: Any) -> tuple[str, float]:
    """Kind and FLOPs, 2 a multiplication; of causal attention half of those to all keys."""
    if name in ("mm", "bmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm"):
        a, b = given[:2]
    elif name in ("addmm", "addmm_", "baddbmm_", "baddbmm"):
        a, b = given[1:3]
    elif name.startswith("_flash_attention"):
        return "attention", math.nan  # of documents or a window, which are not known here
    elif name.startswith("_scaled_dot_product"):
        back = "backward" in name
        q, k, v = given[1:4] if back else given[:3]
        share = 0.5 if any(x is True for x in args) else 1.0
        pairs = q.shape[:-1].numel() * k.shape[-2] * share
        width, value = q.shape[-1], v.shape[-1]
        return ("attention backward", 2 * pairs * (3 * width + 2 * value)) if back else (
            "attention", 2 * pairs * (width + value))  # fmt: skip
    else:
        return "memory", 0
    return "product" if a.dtype != torch.float32 else "fp32 product", 2 * a.numel() * b.shape[-1]


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
        for name in ("packs", "cudnn_runs"):
            patches.enter_context(patch.object(device, name, lambda *_: True))
        patches.enter_context(patch.object(upload, "_page_locked", torch.empty_like))
        patches.enter_context(patch.object(torch.cuda, "Event", _Event))
        patches.enter_context(patch.object(weight_products, "_EXACT", frozenset({"cuda", "meta"})))
        patches.enter_context(_Log(trace, pinned))
        yield trace
