"""Products of weight gradients, sum += dyᵀ x, where the operands may be of half precision and the sum is not.

A product that is rounded to bf16 before it is added is off by 1.7e-3, whatever the sum can hold. GPUs add their fp32
accumulators to an fp32 sum in the same kernel; CPUs have no such product (an fp32 one takes several times as long), so
there the product of every microbatch is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = frozenset({"cuda"} if torch.version.hip is None else ())
"""Devices whose products of half-precision operands can be fp32."""


def is_exact(device: torch.device) -> bool:
    """Whether `add_product` and `add_products` lose nothing of half-precision operands there."""
    return device.type in _EXACT


def add_product(total: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
    """total (out, in) becomes (fresh) or gains dyᵀ x, for dy (N, out) and x (N, in) of one type."""
    rows = dy.t()
    if dy.dtype == total.dtype:
        torch.mm(rows, x, out=total) if fresh else total.addmm_(rows, x)
    elif not is_exact(dy.device):
        add(total, torch.mm(rows, x), fresh)
    elif fresh:
        torch.mm(rows, x, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, rows, x, out_dtype=total.dtype, out=total)


def add_products(total: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
    """The same for a batch: total (E, out, in), dy (E, N, out), x (E, N, in)."""
    rows = dy.transpose(1, 2)
    if dy.dtype == total.dtype:
        torch.bmm(rows, x, out=total) if fresh else total.baddbmm_(rows, x)
    elif not is_exact(dy.device):
        add(total, torch.bmm(rows, x), fresh)
    elif fresh:
        torch.bmm(rows, x, out_dtype=total.dtype, out=total)
    else:  # not torch.baddbmm: its form with another type cannot be traced on meta devices
        total.add_(torch.bmm(rows, x, out_dtype=total.dtype))


def add(total: Tensor, product: Tensor, fresh: bool) -> None:
    """total becomes (fresh) or gains the product, of any precision."""
    if fresh:
        total.copy_(product)
    else:
        total.add_(product)
