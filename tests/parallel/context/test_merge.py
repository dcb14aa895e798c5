"""Joining attention to separate sets of keys, against attention to all keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pentad.parallel.kernels.merge import add_sinks, merge, merge_, sinks_grad

NOTHING = float("-inf")


def attend(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """scores (B, H, n, m) and v (B, m, H, e), where m may be 0 → out and lse."""
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], NOTHING)
    probs = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("bhij,bjhe->bihe", probs, v), lse


def problem(keys: int = 12) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, keys, generator=draws, dtype=torch.float64) * 5
    return scores, torch.randn(2, keys, 3, 4, generator=draws, dtype=torch.float64)


@pytest.mark.parametrize("cut", [0, 1, 7, 12])
@pytest.mark.parametrize("in_place", [False, True])
def test_two_parts(cut, in_place):
    scores, v = problem()
    scores[:, :, 1, :7] = NOTHING
    scores[:, :, 2, 7:] = NOTHING
    scores[:, :, 3] = NOTHING
    expected = attend(scores, v)
    (out, lse), (out_b, lse_b) = attend(scores[..., :cut], v[:, :cut]), attend(scores[..., cut:], v[:, cut:])
    before = out.clone(), lse.clone()
    if in_place:
        merge_(out, lse, out_b, lse_b)
        found = out, lse
    else:
        found = merge(out, lse, out_b, lse_b)
        torch.testing.assert_close((out, lse), before, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert (found[1][:, :, 3] == NOTHING).all() and (found[0][:, 3] == 0).all()


def test_many_parts_of_very_different_size_in_any_order():
    """Scores hundreds apart: no part may overflow or swallow another of the same size."""
    scores, v = problem()
    scores += torch.linspace(-900, 900, 12, dtype=torch.float64)
    expected = attend(scores, v)
    for order in (range(12), reversed(range(12)), (5, 11, 0, 3, 9, 1, 2, 4, 6, 7, 8, 10)):
        out, lse = torch.zeros(2, 5, 3, 4, dtype=torch.float64), torch.full((2, 3, 5), NOTHING, dtype=torch.float64)
        for j in order:
            merge_(out, lse, *attend(scores[..., j : j + 1], v[:, j : j + 1]))
        torch.testing.assert_close((out, lse), expected, rtol=1e-12, atol=1e-13)


def test_views_of_an_accumulator():
    """A ring merges some rows only."""
    scores, v = problem()
    scores[:, :, :2, 6:] = NOTHING
    expected = attend(scores, v)
    out, lse = attend(scores[..., :6], v[:, :6])
    merge_(out[:, 2:], lse[:, :, 2:], *attend(scores[:, :, 2:, 6:], v[:, 6:]))
    torch.testing.assert_close((out, lse), expected, rtol=1e-13, atol=1e-14)


def test_sums_of_bf16_parts_are_in_fp32():
    scores, v = problem(64)
    expected = attend(scores, v)[0]
    out, lse = torch.zeros(2, 5, 3, 4), torch.full((2, 3, 5), NOTHING)
    parts = [attend(scores[..., j : j + 1], v[:, j : j + 1]) for j in range(64)]
    for part, part_lse in parts:
        out, lse = merge(out, lse, part.bfloat16(), part_lse.float())
    assert out.dtype == lse.dtype == torch.float32
    # A rounding of bf16 per merge would add up to several times 2⁻⁹.
    assert ((out - expected).norm() / expected.norm()) < 2**-9


def test_sinks_are_keys_without_values():
    scores, v = problem()
    scores[:, :, 1] = NOTHING
    sinks = torch.tensor([-1.0, 0.5, 40.0], dtype=torch.float64, requires_grad=True)
    with_sinks = torch.cat((scores, sinks[None, :, None, None].expand(2, -1, 5, 1)), -1)
    out = torch.einsum("bhij,bjhe->bihe", with_sinks.softmax(-1)[..., :-1], v)
    found, lse = add_sinks(*attend(scores, v), sinks.detach())
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, with_sinks.logsumexp(-1), rtol=1e-13, atol=1e-13)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, sinks, dout)
    torch.testing.assert_close(sinks_grad(dout, found, lse, sinks.detach()), expected, rtol=1e-11, atol=1e-13)
