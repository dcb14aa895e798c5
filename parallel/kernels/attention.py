"""Attention with autograd, wherever its keys and values are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .interfaces import LocalAttention
from .mask import Mask
from .merge import add_sinks, sinks_grad


class Attends(Protocol):
    """One call of attention without autograd and sinks: q (B, n, H, d) of this device's tokens, and two tensors from
    which their keys and values follow; in general these are k (B, m, K, d) and v (B, m, K, e)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, /) -> tuple[Tensor, Tensor]:
        """out (B, n, H, e) in q's type or in lse's, and lse (B, H, n)."""
        ...

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in any precision, from an out and lse that may include sinks."""
        ...


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, out and lse; the call makes the rest again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Attends) -> Tensor:
        out, lse = call.attend(q, k, v)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.call.differentiate(dout, q, k, v, out, lse)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = sinks_grad(dout, out, lse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None


def differentiable(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Attends) -> Tensor:
    """out (B, n, H, e) of the call, with autograd once and with sinks (H,); q, k, v as of `Attends`."""
    return _Attention.apply(q, k, v, sinks, call)


@dataclass(frozen=True)
class _OneDevice:
    """Queries and keys are on one device."""

    local: LocalAttention
    mask: Mask
    scale: float

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.local.forward(q, k, v, self.mask, self.scale)

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.local.backward(dout, q, k, v, out, lse, self.mask, self.scale)


def attention(
    local: LocalAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, n, H, d), k (B, m, K, d), v (B, m, K, e) → (B, n, H, e), with autograd once and with sinks (H,)."""
    return differentiable(q, k, v, sinks, _OneDevice(local, mask, scale))
