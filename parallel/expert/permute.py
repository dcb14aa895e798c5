"""Rows of tokens into the order of their experts, and back.

Shapes: n tokens, K assignments of a token, R rows, h features. `places` (n, K) says in which row each assignment stands
(-1: in none), each row holding at most one. Backwards are written by hand: gathers and sums over K in a fixed order, so
that nothing is scattered with atomics and a run repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.precision import precise


def spread(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """Copies tokens into rows.

    Args:
        x: (n, h).
        tokens: (R,) the token of each row; a row that no place names is padding and gives no gradient.
        places: (n, K) the rows of each token's assignments, or -1.

    Returns:
        (R, h).
    """
    return _Spread.apply(x, tokens, places)


def combine(rows: Tensor, places: Tensor, weights: Tensor | None = None, padded: bool = True) -> Tensor:
    """y[t] = Σ_k weights[t, k] · rows[places[t, k]], without the places that are -1; summed in fp32 (fp64 in fp64).

    Args:
        rows: (R, h).
        places: (n, K), or -1.
        weights: (n, K), in any floating type; none: all 1.
        padded: rows that no place names get the gradient 0; else nobody reads it, and kernels may leave it unwritten.

    Returns:
        (n, h), of rows' dtype.
    """
    return _Combine.apply(rows, places, weights)


def reorder(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """y[r] = x[index[r]] for a permutation `index` of x's (R, h) rows, whose inverse is `inverse`."""
    return _Reorder.apply(x, index, inverse)


def _sum_places(rows: Tensor, places: Tensor) -> Tensor:
    """Σ_k rows[places[t, k]] as (n, h). Fused, and twice to ten times as fast on CPU as gathering first."""
    if not len(rows) or not places.numel():
        return rows.new_zeros(len(places), rows.shape[1])
    # A place of -1 reads row 0 times 0: asking whether there are any would make a GPU wait.
    present = (places >= 0).to(rows.dtype)
    return F.embedding_bag(places.clamp(min=0), rows, mode="sum", per_sample_weights=present)


def _weigh_places(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    if not len(rows) or not places.numel():
        return rows.new_zeros(len(places), rows.shape[1])
    weights = torch.where(places >= 0, weights, 0)
    places = places.clamp(min=0)
    dtype = precise(rows.dtype)
    if rows.dtype == dtype:
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights.to(dtype))
    # embedding_bag would round the weights to 16 bits.
    weights = weights.to(dtype)
    y = torch.mul(rows.index_select(0, places[:, 0]), weights[:, :1])
    for k in range(1, places.shape[1]):
        y.addcmul_(rows.index_select(0, places[:, k]), weights[:, k : k + 1])
    return y.to(rows.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return _sum_places(dy, places), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
        ctx.count = len(rows)
        weighs = ctx.needs_input_grad[2]  # only then the rows are needed
        ctx.save_for_backward(places, weights, rows if weighs else None)
        return _sum_places(rows, places) if weights is None else _weigh_places(rows, places, weights)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        places, weights, rows = ctx.saved_tensors
        drows = _rows_grad(dy, places, weights, ctx.count) if ctx.needs_input_grad[0] else None
        return drows, None, None if rows is None else _weights_grad(dy, rows, places, weights)


def _rows_grad(dy: Tensor, places: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    """drows[places[t, k]] = weights[t, k] · dy[t]; 0 in rows that no place names."""
    n, k = places.shape
    if not n * k or not rows:
        return dy.new_zeros(rows, dy.shape[1])
    flat = places.reshape(-1)
    # Which assignment stands in each row; n · K: none. What is nowhere goes to a row past the end.
    owner = flat.new_full((rows + 1,), n * k)
    owner.scatter_(0, torch.where(flat >= 0, flat, rows), torch.arange(n * k, device=flat.device))
    owner = owner[:rows]
    gathered = dy.index_select(0, (owner // k).clamp(max=n - 1))
    factors = dy.new_ones(n * k) if weights is None else weights.reshape(-1)
    return gathered.mul_(F.pad(factors, (0, 1)).index_select(0, owner).unsqueeze(1))


def _weights_grad(dy: Tensor, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """dweights[t, k] = rows[places[t, k]] · dy[t]."""
    if not len(rows) or not places.numel():
        return torch.zeros_like(weights)
    dtype = precise(rows.dtype)
    dy, index = dy.to(dtype), places.clamp(min=0)
    dots = [rows.index_select(0, index[:, k]).to(dtype).mul_(dy).sum(-1) for k in range(index.shape[1])]
    return torch.where(places >= 0, torch.stack(dots, 1), 0).to(weights.dtype)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None
