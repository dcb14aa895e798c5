"""Rows of experts by kernels in Triton, run by its interpreter, against plain indexing in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pentad.parallel.expert.permute import combine, spread
from pentad.parallel.expert.plan import sort_by_expert
from pentad.parallel.kernels.triton.counting_sort import triton_sort_by_expert
from pentad.parallel.kernels.triton.rows import triton_combine, triton_spread
from tests.parallel.kernels.triton.test_kernels import DEVICE, HALF, _close, _draw


def _ids(n: int, k: int, experts: int, lowest: int) -> Tensor:
    return torch.randint(lowest, experts, (n, k), generator=torch.Generator().manual_seed(n + k)).to(DEVICE)


@pytest.mark.parametrize("lowest", [-1, 0])
@pytest.mark.parametrize(("n", "k", "experts"), [(0, 2, 4), (1, 1, 1), (7, 2, 4), (700, 4, 8), (9, 3, 100)])
def test_a_counting_sort_is_a_stable_sort(n: int, k: int, experts: int, lowest: int) -> None:
    ids = _ids(n, k, experts, lowest)
    for found, expected in zip(triton_sort_by_expert(ids, experts), sort_by_expert(ids, experts), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def _journey(n: int, k: int, lowest: int, padding: int) -> tuple[Tensor, Tensor]:
    """Tokens of rows (R,) and places (n, K), with rows behind that no place names."""
    ids = _ids(n, k, 5, lowest)
    order, places, _ = sort_by_expert(ids, 5)
    tokens = torch.cat((order[: int((ids >= 0).sum())] // k, order.new_zeros(padding)))
    return tokens, places


CASES = pytest.mark.parametrize(
    ("n", "k", "lowest", "padding"), [(1, 1, 0, 0), (7, 2, 0, 0), (9, 3, -1, 0), (9, 3, -1, 5), (4, 8, -1, 2)]
)


@HALF
@CASES
@pytest.mark.parametrize("width", [1, 33, 2100])
def test_rows_leave_as_plain_indexing_has_it(
    n: int, k: int, lowest: int, padding: int, width: int, dtype: torch.dtype
) -> None:
    tokens, places = _journey(n, k, lowest, padding)
    x = _draw(n, width, dtype=dtype).requires_grad_()
    dy = _draw(len(tokens), width, dtype=dtype, seed=1)
    wide = x.detach().double().requires_grad_()
    y = triton_spread(x, tokens, places)
    assert torch.equal(y, x[tokens])
    (expected,) = torch.autograd.grad(spread(wide, tokens, places), wide, dy.double())
    _close(torch.autograd.grad(y, x, dy)[0], expected, dtype)


@HALF
@CASES
@pytest.mark.parametrize("width", [1, 33, 2100])
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_come_back_as_plain_sums_have_it(
    n: int, k: int, lowest: int, padding: int, width: int, weighted: bool, dtype: torch.dtype
) -> None:
    tokens, places = _journey(n, k, lowest, padding)
    rows = _draw(len(tokens), width, dtype=dtype).requires_grad_()
    weights = torch.rand(n, k, device=DEVICE).requires_grad_() if weighted else None
    wide = rows.detach().double().requires_grad_()
    exact = weights.detach().double().requires_grad_() if weights is not None else None
    y, expected = triton_combine(rows, places, weights), combine(wide, places, exact)
    dy = _draw(n, width, dtype=dtype, seed=1)
    _close(y.detach(), expected.detach(), dtype)
    leaves, references = [rows, weights][: 1 + weighted], [wide, exact][: 1 + weighted]
    found = torch.autograd.grad(y, leaves, dy)
    reference = torch.autograd.grad(expected, references, dy.double())
    _close(found[0], reference[0], dtype)
    if weighted:
        assert torch.allclose(found[1].double(), reference[1], rtol=1e-5, atol=1e-5 * width**0.5)


def test_rows_that_nobody_reads_need_not_be_written() -> None:
    tokens, places = _journey(9, 3, 0, 0)
    rows = _draw(len(tokens), 16, dtype=torch.bfloat16).requires_grad_()
    dy = _draw(9, 16, dtype=torch.bfloat16, seed=1)
    grads = [torch.autograd.grad(triton_combine(rows, places, None, padded), rows, dy)[0] for padded in (True, False)]
    assert torch.equal(*grads)
