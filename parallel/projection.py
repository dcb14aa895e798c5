"""The projection: every weight GEMM of a model goes through here.

One or several weights that read the same input form one projection, so that its input is communicated once and the
gradient of the input is one sum. `enter` and `leave` say what happens around the GEMMs; local projections do nothing,
tensor parallel ones gather the input's tokens or scatter the output's (`tensor.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .comm.collectives import Handle
from .gradients import matmul_grad, open_store, plain_grad
from .kernels.precision import precise


class HasWeight(Protocol):
    """What a projection needs of a linear layer."""

    @property
    def weight(self) -> Any: ...
    @property
    def bias(self) -> Any: ...


class Projection(Protocol):
    """Applies the weights of `linears` to x (N, in) and returns one y (N, out) per linear."""

    def __call__(self, x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]: ...


def local(x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
    """y_i (N, out_i) = x (N, in) W_iᵀ + b_i on one device."""
    return run_projection(x, linears, ProjectionComm())


def run_projection(x: Tensor, linears: Sequence[HasWeight], around: ProjectionComm) -> tuple[Tensor, ...]:
    """The projection of x (N, in) with communication `around` it → (N, out) per linear."""
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    out = _Project.apply(around, len(weights), x, *weights, *biases)
    return out if isinstance(out, tuple) else (out,)


class ProjectionComm:
    """What happens around the GEMMs. This one is for a single device."""

    bias_before_leave = True
    """False: the bias is added once, after `leave` has summed the partial outputs."""

    def enter(self, x: Tensor) -> Tensor:
        """The input of the GEMMs (N, in) from that of the projection, which may be a part of it (n, in)."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """The output of the projection, (N, out) or a part (n, out), from that of a GEMM (N, out)."""
        return y

    def enter_backward(self, dx: Tensor) -> Handle:
        """The gradient of the projection's input, (N, in) or (n, in), from that of the GEMMs' input (N, in)."""
        return Handle(dx)

    def leave_backward(self, dy: Tensor) -> Tensor:
        """The gradient of a GEMM's output (N, out) from that of the projection's, (N, out) or (n, out)."""
        return dy

    def regather(self, x: Tensor) -> Handle:
        """The input of the GEMMs (N, in) once more, for the weight gradients."""
        return Handle(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


@dataclass(frozen=True)
class _WeightGrads:
    """The weight gradients of one projection, which its backward computes at once or leaves for later."""

    around: ProjectionComm
    x: Tensor
    weights: Sequence[Tensor]
    dys: Sequence[Tensor]

    def start(self) -> Handle:
        return self.around.regather(self.x)

    def finish(self, whole: Tensor) -> list[Tensor | None]:
        return [matmul_grad(w, dy, whole) for w, dy in zip(self.weights, self.dys, strict=True)]


class _Project(torch.autograd.Function):
    """Inputs: around, n, x, n weights, n biases (or None)."""

    @staticmethod
    def forward(ctx, around: ProjectionComm, n: int, x: Tensor, *params: Tensor | None) -> Any:
        weights, biases = params[:n], params[n:]
        whole = around.enter(x)
        outputs = []
        for weight, bias in zip(weights, biases, strict=True):
            assert weight is not None
            y = around.leave(_linear(whole, weight, bias if around.bias_before_leave else None))
            outputs.append(y if bias is None or around.bias_before_leave else y.add_(bias))
        ctx.around, ctx.n = around, n
        # Not among the saved tensors: what hooks (recompute, offload) give back for a parameter has lost its slot.
        ctx.params = params
        ctx.save_for_backward(x)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        around: ProjectionComm = ctx.around
        (x,) = ctx.saved_tensors
        weights, biases = ctx.params[: ctx.n], ctx.params[ctx.n :]
        bias_grads: list[Tensor | None] = [None] * ctx.n
        store = open_store(weights)
        gathering = around.regather(x) if store is None else None  # travels while dx is computed
        outer, dys = grads, []
        for dy in grads:
            dys.append(around.leave_backward(dy))
        dx = None
        if ctx.needs_input_grad[2]:
            dx = torch.mm(dys[0], weights[0])
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
        scattering = around.enter_backward(dx) if dx is not None else None  # travels while dW is computed
        deferred = _WeightGrads(around, x, weights, dys)
        if store is not None:
            store.put(deferred)
        weight_grads = [None] * ctx.n if gathering is None else deferred.finish(gathering.wait())
        for i, bias in enumerate(biases):
            if bias is not None:
                dy = dys[i] if around.bias_before_leave else outer[i]
                bias_grads[i] = plain_grad(bias, dy.sum(0, dtype=precise(dy.dtype)))
        return None, None, scattering.wait() if scattering else None, *weight_grads, *bias_grads
