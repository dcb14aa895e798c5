"""Permutations against plain indexing, whose gradients autograd makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pentad.parallel.expert.permute import combine, reorder, spread


def _layout(n: int, k: int, *, missing: bool, padding: int = 0) -> tuple[Tensor, Tensor]:
    """(tokens (R,), places (n, K)) with rows in random order, some places -1, and some rows padding."""
    generator = torch.Generator().manual_seed(n + 10 * k)
    flat = torch.full((n * k,), -1)
    kept = torch.arange(n * k)
    if missing:
        kept = kept[torch.rand(n * k, generator=generator) < 0.6]
    rows = torch.randperm(len(kept) + padding, generator=generator)[: len(kept)]
    flat[kept] = rows
    tokens = torch.zeros(len(kept) + padding, dtype=torch.long)
    tokens[rows] = kept // k
    return tokens, flat.view(n, k)


def _plain_combine(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    gathered = rows[places.clamp(min=0)] * (places >= 0).unsqueeze(-1)
    return (gathered if weights is None else gathered * weights.unsqueeze(-1)).sum(1)


def _grads(f: Callable[[], Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    y = f()
    return (y, *torch.autograd.grad(y, inputs, dy.to(y.dtype)))


CASES = [(7, 1, False, 0), (7, 2, False, 0), (9, 3, True, 0), (9, 3, True, 5), (4, 8, True, 2), (0, 2, False, 0)]


@pytest.mark.parametrize(("n", "k", "missing", "padding"), CASES)
def test_spread_and_combine_equal_plain_indexing(n: int, k: int, missing: bool, padding: int) -> None:
    tokens, places = _layout(n, k, missing=missing, padding=padding)
    x = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(tokens), 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(n, k, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(n, 5, dtype=torch.float64)

    named = torch.zeros(len(tokens), 1, dtype=torch.float64)
    named[places[places >= 0]] = 1
    drows = torch.randn(len(tokens), 5, dtype=torch.float64) * named
    for ours, plain in zip(
        _grads(lambda: spread(x, tokens, places), drows, x), _grads(lambda: x[tokens], drows, x), strict=True
    ):
        torch.testing.assert_close(ours, plain)
    for ours, plain in zip(
        _grads(lambda: combine(rows, places, weights), dy, rows, weights),
        _grads(lambda: _plain_combine(rows, places, weights), dy, rows, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)
    for ours, plain in zip(
        _grads(lambda: combine(rows, places), dy, rows),
        _grads(lambda: _plain_combine(rows, places, None), dy, rows),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_gradcheck() -> None:
    tokens, places = _layout(5, 3, missing=True)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randperm(len(tokens))

    def there_and_back(x: Tensor, weights: Tensor) -> Tensor:
        rows = reorder(spread(x, tokens, places).sin(), index, torch.argsort(index))
        return combine(reorder(rows, torch.argsort(index), index), places, weights)

    assert torch.autograd.gradcheck(there_and_back, (x, weights))


def test_padding_gives_no_gradient() -> None:
    tokens, places = _layout(6, 2, missing=True, padding=4)
    x = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    spread(x, tokens, places).sum().backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == (places >= 0).sum(1).tolist()


@pytest.mark.parametrize("weighted", [False, True])
def test_bf16_is_summed_in_fp32(weighted: bool) -> None:
    """The 16-bit result is the fp32 one rounded once: at most half a unit in the last of 8 bits away."""
    n, k = 64, 16
    tokens, places = _layout(n, k, missing=True)
    rows = torch.randn(len(tokens), 32).bfloat16()
    weights = torch.rand(n, k) if weighted else None
    exact = _plain_combine(rows.double(), places, None if weights is None else weights.double())
    y = combine(rows, places, weights)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)

    x = torch.zeros(n, 32, dtype=torch.bfloat16, requires_grad=True)
    (dx,) = torch.autograd.grad(spread(x, tokens, places), x, rows)
    torch.testing.assert_close(dx.double(), _plain_combine(rows.double(), places, None), rtol=2**-8, atol=1e-5)


def test_gradients_of_bf16_rows_and_fp32_weights() -> None:
    n, k = 16, 4
    tokens, places = _layout(n, k, missing=True, padding=3)
    rows = torch.randn(len(tokens), 64).bfloat16().requires_grad_()
    weights = torch.rand(n, k).requires_grad_()
    dy = torch.randn(n, 64).bfloat16()
    drows, dweights = torch.autograd.grad(combine(rows, places, weights), (rows, weights), dy)
    exact_rows, exact_weights = rows.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    _plain_combine(exact_rows, places, exact_weights).backward(dy.double())
    assert drows.dtype == torch.bfloat16 and dweights.dtype == torch.float32
    assert exact_rows.grad is not None and exact_weights.grad is not None
    torch.testing.assert_close(drows.double(), exact_rows.grad, rtol=2**-8, atol=0)
    torch.testing.assert_close(dweights.double(), exact_weights.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype: torch.dtype) -> None:
    """All assignments of a rank may go elsewhere."""
    x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    weights = torch.rand(4, 2, requires_grad=True)
    places = torch.full((4, 2), -1)
    rows = spread(x, torch.zeros(0, dtype=torch.long), places)
    rows = reorder(rows, torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    y = combine(rows, places, weights)
    y.backward(torch.ones_like(y))
    assert rows.shape == (0, 3) and y.shape == (4, 3) and not y.any()
    assert x.grad is not None and not x.grad.any() and weights.grad is not None and not weights.grad.any()


def test_combine_keeps_the_rows_only_for_the_weights() -> None:
    rows = torch.randn(6, 3, requires_grad=True)
    places = torch.arange(6).view(3, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        combine(rows, places)
        combine(rows, places, torch.rand(3, 2))
    assert all(t.shape != rows.shape for t in kept)
