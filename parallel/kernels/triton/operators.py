"""Kernels as operators of torch, `torch.ops.pentad.NAME`.

So they stand in traces and profiles under their names, may be used where torch compiles, and know on meta tensors what
shapes they give. On a CPU they run under Triton's interpreter, if that was asked for before Triton was imported
(TRITON_INTERPRET=1): slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("pentad", "FRAGMENT")

LAUNCHES: dict[str, int] = {}
"""Kernels that each operator starts."""

Made = TypeVar("Made", bound=Callable[..., Any])


def operator(schema: str, shapes: Callable[..., Any], launches: int = 1) -> Callable[[Made], Made]:
    """Makes an operator of a function that launches kernels.

    Args:
        schema: `name(Tensor x, …) -> Tensor`, with what it writes to marked as torch does.
        shapes: allocates the results from the arguments.
        launches: kernels that it starts.
    """
    name = schema.partition("(")[0]

    def register(launch: Made) -> Made:
        _LIBRARY.define(schema)
        for key in ("CUDA", "CPU"):
            _LIBRARY.impl(name, launch, key)
        _LIBRARY.impl(name, shapes, "Meta")
        LAUNCHES[f"pentad::{name}"] = launches
        return getattr(torch.ops.pentad, name).default

    return register


def programs_of(x: Tensor) -> int:
    """Programs that together fill the device, for kernels that go over the rest by themselves: always as many on the
    same device, so that sums have one order."""
    if x.device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(x.device).multi_processor_count
