"""Attention over packed documents and windows in one call, through a stand-in of torch's operators for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.parallel.kernels import packed_flash
from pentad.parallel.kernels.device import Cuda
from pentad.parallel.kernels.mask import Mask, TokenIndex
from pentad.parallel.kernels.packed_flash import PackedFlash, documents_of, packs
from pentad.parallel.kernels.plain_maths import PlainMaths
from tests.parallel.kernels.test_device import rows, tensors

SCALE = 0.3


class _Operators:
    """What torch's schemas and FlashAttention's documentation say of both operators, by plain maths."""

    calls: int = 0

    def _parts(self, q: Tensor, bounds: Tensor | None, causal: bool, left: int | None, right: int | None) -> list[Any]:
        assert causal and right in (None, 0) and q.stride(-1) == 1 and q.shape[-1] % 8 == 0
        self.calls += 1
        window = None if left is None else left + 1
        if bounds is None:
            assert q.dim() == 4
            return [(slice(None), Mask.of(TokenIndex.whole(q.shape[1]), window))]
        assert q.dim() == 3 and bounds.dtype == torch.int32
        edges = bounds.tolist()
        return [(slice(a, b), Mask.of(TokenIndex.whole(b - a), window)) for a, b in pairwise(edges)]

    def _flash_attention_forward(
        self, q, k, v, bounds, same, longest, longest_too, dropout, causal, debug, *, scale, window_size_left=None,
        window_size_right=None,
    ):  # fmt: skip
        assert dropout == 0.0 and debug is False and longest == longest_too and bounds is same
        found = self._parts(q, bounds, causal, window_size_left, window_size_right)
        if bounds is None:
            return *PlainMaths().forward(q, k, v, found[0][1], scale), None, None, None
        assert longest == int(bounds.diff().max())
        made = [PlainMaths().forward(q[None, at], k[None, at], v[None, at], mask, scale) for at, mask in found]
        return torch.cat([y[0] for y, _ in made]), torch.cat([lse[0] for _, lse in made], 1), None, None, None

    def _flash_attention_backward(
        self, dout, q, k, v, out, lse, bounds, same, longest, longest_too, dropout, causal, seed, unused, *, scale,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout == 0.0 and longest == longest_too and bounds is same and lse.is_contiguous()
        assert dout.shape[-1] == q.shape[-1] == out.shape[-1]
        found = self._parts(q, bounds, causal, window_size_left, window_size_right)
        if bounds is None:
            grads = PlainMaths().backward(dout, q, k, v, out, lse, found[0][1], scale)
            return tuple(grad.to(q.dtype) for grad in grads)
        made = []
        for at, mask in found:
            dy, x, keys, values, y = (each[None, at] for each in (dout, q, k, v, out))
            made.append(PlainMaths().backward(dy, x, keys, values, y, lse[None, :, at], mask, scale))
        return tuple(torch.cat([grads[i][0] for grads in made]).to(q.dtype) for i in range(3))


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Operators]:
    made = _Operators()
    monkeypatch.setattr(packed_flash, "_ops", made)
    packs.cache_clear()
    yield made
    packs.cache_clear()


PACKED = rows(range(40), lengths=[[11, 1, 28], [40]])
MASKS = {
    "documents": Mask.of(PACKED),
    "a window": Mask.of(TokenIndex.whole(40), 7),
    "a window in documents": Mask.of(PACKED, 7),
    "a window of one": Mask.of(PACKED, 1),
}


@pytest.mark.parametrize("widths", [(16, 16), (12, 12), (24, 16)])
@pytest.mark.parametrize("name", MASKS)
def test_one_call_sees_what_the_mask_says(operators: _Operators, name: str, widths: tuple[int, int]) -> None:
    mask = MASKS[name]
    q, k, v, dout = tensors(mask, (4, 2, *widths))
    out, lse = PlainMaths().forward(q, k, v, mask, SCALE)
    expected = (out, lse, *PlainMaths().backward(dout, q, k, v, out, lse, mask, SCALE))
    y, sums = PackedFlash().forward(q, k, v, mask, SCALE)
    found = (y, sums, *PackedFlash().backward(dout, q, k, v, y, sums, mask, SCALE))
    assert operators.calls == 2
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_heads_that_lie_before_their_tokens_are_taken_as_they_are(operators: _Operators) -> None:
    mask = MASKS["documents"]
    q, k, v, _ = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(mask, (4, 2, 8, 8)))
    found = PackedFlash().forward(q, k, v, mask, SCALE)
    for mine, theirs in zip(found, PlainMaths().forward(q, k, v, mask, SCALE), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (TokenIndex.whole(40).part(0, 20), TokenIndex.whole(40)),
        (rows([*range(10), *range(20, 30)]), rows([*range(10), *range(20, 30)])),
        (rows(range(40), lengths=[[20, 20], [40]]), TokenIndex.whole(40)),
        (TokenIndex.whole(4, torch.tensor([[0, 1, 0, 0]])), TokenIndex.whole(4, torch.tensor([[0, 1, 0, 0]]))),
    ],
)
def test_what_is_no_whole_sequence_is_left_to_others(queries: TokenIndex, keys: TokenIndex) -> None:
    assert documents_of(queries, keys, 2) is None


def test_documents_end_with_their_sequence() -> None:
    found = documents_of(PACKED, PACKED, 2)
    assert found is not None and found.bounds is not None
    assert found.bounds.tolist() == [0, 11, 12, 40, 80] and found.longest == 40


def test_a_gpu_takes_it_where_it_computes_what_it_should(operators, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda, x = Cuda(), torch.zeros(2, 40, 2, 16, dtype=torch.bfloat16)
    for mask in MASKS.values():
        assert cuda.best(x, x, mask) is cuda._packed
    wide, plain = torch.zeros(2, 40, 2, 264, dtype=torch.bfloat16), Mask.of(TokenIndex.whole(40))
    assert cuda.best(wide, wide, MASKS["documents"]) is cuda._precise
    assert cuda.best(x, x, plain) is cuda.best(x, x, Mask(PACKED.part(0, 9), PACKED)) is cuda._flash
    assert capsys.readouterr().err == ""
    packs.cache_clear()
    monkeypatch.setattr(operators, "_flash_attention_forward", lambda *args, **named: (x[:1], x[:1]))
    assert cuda.best(x, x, MASKS["documents"]) is cuda._flash
    assert "FlashAttention over packed documents does not run with PyTorch" in capsys.readouterr().err
