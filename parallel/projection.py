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

from .comm.axis import Axis
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


class Products(Protocol):
    """The three products of each weight W (out, in) with what a GEMM has on its device."""

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], cut: Axis | None
    ) -> tuple[list[Tensor], Any]:
        """x (N, in) Wᵀ + b as (N, out) per weight, and what the others are to be told.

        Args:
            cut: the axis over which `in` is cut; none: it is whole.
        """
        ...

    def backward(
        self, dys: Sequence[Tensor], weights: Sequence[Tensor], cut: Axis | None, told: Any, wanted: bool
    ) -> tuple[Tensor | None, Sequence[Any]]:
        """Σ dy (N, out) W as (N, in) where it is `wanted`, and what `weight_gradients` is to be given as dys.

        Args:
            cut: the axis over which `out` is cut; none: it is whole.
        """
        ...

    def weight_gradients(
        self, weights: Sequence[Tensor], dys: Sequence[Any], x: Tensor, told: Any
    ) -> list[Tensor | None]:
        """dyᵀ x (out, in) per weight, into its slot (none is returned) or for autograd."""
        ...


class PlainProducts:
    """Products of the operands as they are."""

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], cut: Axis | None
    ) -> tuple[list[Tensor], None]:
        """As `Products`."""
        return [_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], None

    def backward(
        self, dys: Sequence[Tensor], weights: Sequence[Tensor], cut: Axis | None, told: None, wanted: bool
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        """As `Products`."""
        if not wanted:
            return None, dys
        dx = torch.mm(dys[0], weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        return dx, dys

    def weight_gradients(
        self, weights: Sequence[Tensor], dys: Sequence[Tensor], x: Tensor, told: None
    ) -> list[Tensor | None]:
        """As `Products`."""
        return [matmul_grad(weight, dy, x) for weight, dy in zip(weights, dys, strict=True)]


def local(x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
    """y_i (N, out_i) = x (N, in) W_iᵀ + b_i on one device."""
    return run_projection(x, linears, ProjectionComm())


@dataclass(frozen=True)
class LocalProjection:
    """`local` with products of another kind."""

    products: Products

    def __call__(self, x: Tensor, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
        return run_projection(x, linears, ProjectionComm(), self.products)


PLAIN: Products = PlainProducts()


def run_projection(
    x: Tensor, linears: Sequence[HasWeight], around: ProjectionComm, products: Products = PLAIN
) -> tuple[Tensor, ...]:
    """The projection of x (N, in) with communication `around` its products → (N, out) per linear."""
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    out = _Project.apply(_Multiplication(around, products, len(weights)), x, *weights, *biases)
    return out if isinstance(out, tuple) else (out,)


class ProjectionComm:
    """What happens around the GEMMs. This one is for a single device."""

    bias_before_leave = True
    """False: the bias is added once, after `leave` has summed the partial outputs."""
    inputs: Axis | None = None
    """Over which the GEMMs' input features are cut."""
    outputs: Axis | None = None
    """Over which their output features are."""

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], products: Products
    ) -> tuple[list[Tensor], Any]:
        """The projection's outputs per weight, and what `products` are to be told in backward."""
        before = biases if self.bias_before_leave else [None] * len(weights)
        made, told = products.forward(self.enter(x), weights, before, self.inputs)
        outputs = []
        for bias in biases:
            y = self.leave(made.pop(0))
            outputs.append(y if bias is None or self.bias_before_leave else y.add_(bias))
        return outputs, told

    def backward(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        products: Products,
        told: Any,
        wanted: bool,
        last: bool,
    ) -> tuple[Sequence[Tensor], Sequence[Any], Handle | None]:
        """Gradients of the GEMMs' outputs, what the weights' gradients are made of, and the projection's input's.

        Args:
            wanted: whether there is to be one of the input.
            last: whether nothing is left to do in this pass while it travels.
        """
        dys = [self.leave_backward(dy) for dy in grads]
        dx, multiplied = products.backward(dys, weights, self.outputs, told, wanted)
        return dys, multiplied, None if dx is None else self.enter_backward(dx)

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


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out (n, out) becomes x (n, in) Wᵀ + b."""
    torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


@dataclass(frozen=True)
class _Multiplication:
    """What one projection is told that no gradient goes to."""

    around: ProjectionComm
    products: Products
    n: int


@dataclass(frozen=True)
class _WeightGrads:
    """The weight gradients of one projection, which its backward computes at once or leaves for later."""

    call: _Multiplication
    x: Tensor
    weights: Sequence[Tensor]
    dys: Sequence[Any]
    told: Any

    def start(self) -> Handle:
        return self.call.around.regather(self.x)

    def finish(self, whole: Tensor) -> list[Tensor | None]:
        return self.call.products.weight_gradients(self.weights, self.dys, whole, self.told)


class _Project(torch.autograd.Function):
    """Inputs: call, x, n weights, n biases (or None)."""

    @staticmethod
    def forward(ctx, call: _Multiplication, x: Tensor, *params: Any) -> Any:
        weights, biases = params[: call.n], params[call.n :]
        outputs, told = call.around.forward(x, weights, biases, call.products)
        ctx.call, ctx.told = call, told
        # Not among the saved tensors: what hooks (recompute, offload) give back for a parameter has lost its slot.
        ctx.params = params
        ctx.save_for_backward(x)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        call: _Multiplication = ctx.call
        around = call.around
        (x,) = ctx.saved_tensors
        weights, biases = ctx.params[: call.n], ctx.params[call.n :]
        bias_grads: list[Tensor | None] = [None] * call.n
        store = open_store(weights)
        gathering = around.regather(x) if store is None else None  # travels while dx is computed
        wanted: bool = ctx.needs_input_grad[1]
        dys, multiplied, scattering = around.backward(
            grads, weights, call.products, ctx.told, wanted, last=store is not None
        )  # the input's gradient travels while dW is computed
        deferred = _WeightGrads(call, x, weights, multiplied, ctx.told)
        if store is not None:
            store.put(deferred)
        weight_grads = [None] * call.n if gathering is None else deferred.finish(gathering.wait())
        for i, bias in enumerate(biases):
            if bias is not None:
                dy = dys[i] if around.bias_before_leave else grads[i]
                bias_grads[i] = plain_grad(bias, dy.sum(0, dtype=precise(dy.dtype)))
        return None, scattering.wait() if scattering else None, *weight_grads, *bias_grads
