"""The router's projection, in a precision of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...parallel.gradients import DeferredMatmul, open_store, plain_grad
from ...parallel.kernels.precision import precise
from ...parallel.kernels.weight_products import is_exact


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, h), weight (C, h), bias (C,) → logits (n, C), computed and returned in fp32 (fp64 for fp64).

    Half-precision logits would make ties of scores that differ. Backward keeps x as it is and raises its precision
    once more.
    """
    return _Logits.apply(x, weight, bias)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = precise(x.dtype)
        # Parameters are not among the saved tensors: what hooks give back for one has lost its slot.
        ctx.params = weight, bias
        ctx.save_for_backward(x)
        if x.dtype != dtype and weight.dtype == x.dtype and is_exact(x.device):
            logits = torch.mm(x, weight.t(), out_dtype=dtype)  # products of half precision are exact in fp32
        else:
            logits = torch.mm(x.to(dtype), weight.to(dtype).t())
        return logits if bias is None else logits.add_(bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), (weight, bias) = ctx.saved_tensors, ctx.params
        dx = torch.mm(dlogits, weight.to(dlogits.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        deferred, store = DeferredMatmul(weight, dlogits, x), open_store((weight,))
        dweight = None
        if store is not None:
            store.put(deferred)
        elif ctx.needs_input_grad[1]:
            dweight = deferred.finish(x)
        dbias = plain_grad(bias, dlogits.sum(0)) if bias is not None else None
        return dx, dweight, dbias
