"""The router's projection, in a precision of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...parallel.comm.collectives import Handle
from ...parallel.gradients import matmul_grad, open_store, plain_grad


def precise(dtype: torch.dtype) -> torch.dtype:
    """The precision of logits, scores and weights for hidden states of `dtype`: fp32, or fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, h), weight (C, h), bias (C,) → logits (n, C), computed and returned in fp32 (fp64 for fp64).

    Half-precision logits would make ties of scores that differ. Backward keeps x as it is and raises its precision
    once more.
    """
    return _Logits.apply(x, weight, bias)


@dataclass(frozen=True)
class _WeightGrad:
    x: Tensor
    weight: Tensor
    dlogits: Tensor

    def start(self) -> Handle:
        return Handle(self.x)

    def finish(self, whole: Tensor) -> Tensor | None:
        return matmul_grad(self.weight, self.dlogits, whole.to(self.dlogits.dtype))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = precise(x.dtype)
        ctx.save_for_backward(x, weight, bias)
        logits = torch.mm(x.to(dtype), weight.to(dtype).t())
        return logits if bias is None else logits.add_(bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        dx = torch.mm(dlogits, weight.to(dlogits.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        deferred, store = _WeightGrad(x, weight, dlogits), open_store((weight,))
        dweight = None
        if store is not None:
            store.put(deferred)
        elif ctx.needs_input_grad[1]:
            dweight = deferred.finish(x)
        dbias = plain_grad(bias, dlogits.sum(0)) if bias is not None else None
        return dx, dweight, dbias
