"""Attention with autograd where queries and keys are on one device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .interfaces import LocalAttention
from .mask import Mask
from .merge import add_sinks, sinks_grad


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, out and lse; a `LocalAttention` makes the rest again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        local: LocalAttention,
        mask: Mask,
        scale: float,
    ) -> Tensor:
        out, lse = local.forward(q, k, v, mask, scale)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.local, ctx.mask, ctx.scale = local, mask, scale
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.local.backward(dout, q, k, v, out, lse, ctx.mask, ctx.scale)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = sinks_grad(dout, out, lse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def attention(
    local: LocalAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, n, H, d), k (B, m, K, d), v (B, m, K, e) → (B, n, H, e), with autograd once; sinks as of `local.Core`."""
    return _Attention.apply(q, k, v, sinks, local, mask, scale)
