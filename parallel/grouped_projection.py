"""The grouped projection: every weight GEMM of a layer's experts goes through here.

The rows of an input stand expert by expert; expert e multiplies its rows by its own matrix:

    x (R, in)  │ rows of expert 0 │ of 1 │ of 2 … │        weight (E, out, in)        y (R, out)

An input that is cheap to make from what is kept anyway need not be kept itself (`RecomputedInput`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .comm.collectives import Handle
from .gradients import grouped_grad, open_store, plain_grad
from .kernels.grouped_gemm import Gemms, Groups, gemms
from .kernels.precision import precise
from .projection import HasWeight

__all__ = ["GroupedProjection", "Groups", "Local", "RecomputedInput", "local"]


@dataclass(frozen=True)
class RecomputedInput:
    """An input (R, in) that is made again in backward rather than kept: weights · function(*inputs).

    Args:
        function: differentiable; gives a new (R, in).
        inputs: what is kept.
        weights: (R,) factors of the rows, in any floating type; they multiply a bias too.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    weights: Tensor | None = None


class GroupedProjection(Protocol):
    """Applies the weights of `linears` to x (R, in) and returns one y (R, out) per linear."""

    def __call__(
        self, x: Tensor | RecomputedInput, groups: Groups, linears: Sequence[HasWeight]
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Local:
    """y_i[rows of e] = x[rows of e] W_i[e]ᵀ + b_i[e] on one device.

    Args:
        compute: how the matrices are multiplied, as `model.moe.compute`.
        products: makes other products of these; none: they are what is wanted.
    """

    compute: str = "auto"
    products: Callable[[Gemms, Groups], Gemms] | None = None

    def __call__(self, x: Tensor | RecomputedInput, groups: Groups, linears: Sequence[HasWeight]) -> tuple[Tensor, ...]:
        made = x if isinstance(x, RecomputedInput) else RecomputedInput(_same, (x,))
        params = [linear.weight for linear in linears] + [linear.bias for linear in linears]
        call = _Call(groups, self.compute, self.products, made.function, len(made.inputs), len(linears))
        out = _GroupedProject.apply(call, made.weights, *made.inputs, *params)
        return out if isinstance(out, tuple) else (out,)


local = Local()
"""The projection of a model to which nothing was done."""


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Call:
    """What one projection is told that no gradient goes to."""

    groups: Groups
    compute: str
    products: Callable[[Gemms, Groups], Gemms] | None
    function: Callable[..., Tensor]
    inputs: int
    linears: int

    def gemms(self, x: Tensor, weight: Tensor) -> Gemms:
        plain = gemms(self.compute, x, weight, self.groups)
        return plain if self.products is None else self.products(plain, self.groups)

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
        """Inputs, weights, biases."""
        first, last = self.inputs, self.inputs + self.linears
        return tensors[:first], tensors[first:last], tensors[last:]


@dataclass(frozen=True)
class _GroupedWeightGrads:
    """The weight gradients of one grouped projection, computed at once or left for later."""

    call: _Call
    x: Tensor
    weights: Sequence[Tensor]
    dys: Sequence[Tensor]

    def start(self) -> Handle:
        return Handle(self.x)

    def finish(self, whole: Tensor) -> list[Tensor | None]:
        return [
            grouped_grad(weight, dy, whole, self.call.gemms(whole, weight))
            for weight, dy in zip(self.weights, self.dys, strict=True)
        ]


class _GroupedProject(torch.autograd.Function):
    """Inputs: call, the rows' weights (or None), inputs, weights, biases (or None)."""

    @staticmethod
    def forward(ctx, call: _Call, scales: Tensor | None, *tensors: Any) -> Any:
        inputs, weights, biases = call.split(tensors)
        x = call.function(*inputs)
        if scales is not None:
            x = x.mul_(scales.unsqueeze(-1))
        outputs = []
        for weight, bias in zip(weights, biases, strict=True):
            y = call.gemms(x, weight).forward(x, weight)
            if bias is not None:
                _add_bias(y, bias, call.groups, scales)
            outputs.append(y)
        ctx.call = call
        # Not among the saved tensors: what hooks (recompute, offload) give back for a parameter has lost its slot.
        ctx.params = tensors[call.inputs :]
        ctx.save_for_backward(scales, *inputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        call: _Call = ctx.call
        scales, *saved = ctx.saved_tensors
        inputs, weights, biases = call.split((*saved, *ctx.params))
        dys = tuple(dy.contiguous() for dy in dys)
        dx = call.gemms(dys[0], weights[0]).backward(dys, weights)
        x, dinputs, dscales = _make_again(call, inputs, scales, dx, ctx.needs_input_grad[2 : 2 + call.inputs])
        bias_grads = [_bias_grad(b, dy, call, scales, dscales) for b, dy in zip(biases, dys, strict=True)]
        if dscales is not None and scales is not None:
            dscales = dscales.to(scales.dtype)
        deferred = _GroupedWeightGrads(call, x, weights, dys)
        store = open_store(weights)
        if store is not None:
            store.put(deferred)
            return None, dscales, *dinputs, *([None] * len(weights)), *bias_grads
        return None, dscales, *dinputs, *deferred.finish(x), *bias_grads


def _make_again(
    call: _Call, inputs: Sequence[Tensor], scales: Tensor | None, dx: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Sequence[Tensor | None], Tensor | None]:
    """The GEMMs' input once more, the gradients of what it was made from, and those of the rows' weights."""
    if call.function is _same:
        return inputs[0], [dx], None
    leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(inputs, needed, strict=True)]
    with torch.enable_grad():
        made = call.function(*leaves)
    x, dscales = made.detach(), None
    if scales is not None:
        dscales = torch.mul(x, dx).sum(-1, dtype=precise(dx.dtype))
        dx = dx.mul_(scales.unsqueeze(-1))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = iter(torch.autograd.grad(made, wanted, dx) if wanted else ())
    dinputs = [next(grads) if leaf.requires_grad else None for leaf in leaves]
    return x if scales is None else x.mul_(scales.unsqueeze(-1)), dinputs, dscales


def _add_bias(y: Tensor, bias: Tensor, groups: Groups, scales: Tensor | None) -> None:
    for expert, start, stop in groups.runs():
        rows = y[start:stop]
        if scales is None:
            rows.add_(bias[expert])
        else:
            rows.addcmul_(scales[start:stop].unsqueeze(-1), bias[expert])


def _bias_grad(
    bias: Tensor | None, dy: Tensor, call: _Call, scales: Tensor | None, dscales: Tensor | None
) -> Tensor | None:
    """The bias's gradient; adds to that of the rows' weights what the bias contributes to it."""
    if bias is None:
        return None
    grad = torch.zeros(bias.shape, dtype=precise(dy.dtype), device=dy.device)
    for expert, start, stop in call.groups.runs():
        rows = dy[start:stop]
        weighted = rows if scales is None else rows * scales[start:stop].unsqueeze(-1)
        torch.sum(weighted, 0, dtype=grad.dtype, out=grad[expert])
        if dscales is not None:
            dscales[start:stop].add_(torch.mv(rows, bias[expert]))
    return plain_grad(bias, grad)
