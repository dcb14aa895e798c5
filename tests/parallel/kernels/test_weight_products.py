"""Weight gradients of half-precision operands, with a stand-in for the products that GPUs have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.models.linear import GroupedLinear, Linear
from pentad.parallel.gradients import Slot, give_slot
from pentad.parallel.grouped_projection import Groups, Local
from pentad.parallel.kernels import grouped_gemm, weight_products
from pentad.parallel.kernels.weight_products import add_product, add_products
from pentad.parallel.vocab import VocabHead, VocabShard

BF16 = torch.bfloat16
STEPS = 4


def _exact(name: str) -> Callable[..., Tensor]:
    """torch's product with `out_dtype`: exact products of half-precision operands, added up in fp32."""
    plain = getattr(torch, name)

    def product(*operands: Tensor, out_dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if out_dtype is not None:
            operands = tuple(x.to(out_dtype) for x in operands)
        return plain(*operands, **rest)

    return product


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU has the products of a GPU."""
    monkeypatch.setattr(weight_products, "_EXACT", frozenset({"cpu"}))
    for name in ("mm", "addmm", "bmm"):
        monkeypatch.setattr(torch, name, _exact(name))


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def _slot(param: Tensor) -> Slot:
    slot = Slot(torch.full(param.shape, torch.nan), lambda: None)
    slot.start_step(STEPS)
    give_slot(param, slot)
    return slot


def _error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def _of_a_linear() -> float:
    linear, truth = Linear(48, 24).to(BF16), torch.zeros(24, 48).double()
    slot = _slot(linear.weight)
    for step in range(STEPS):
        x, dy = _draw(200, 48, seed=step), _draw(200, 24, seed=100 + step)
        linear(x).backward(dy)
        truth += dy.double().t() @ x.double()
    return _error(slot.buffer, truth)


def _of_experts(compute: str, counts: tuple[int, ...]) -> float:
    linear, truth = GroupedLinear(3, 16, 24).to(BF16), torch.zeros(3, 24, 16).double()
    torch.nn.init.zeros_(linear.weight)
    slot, ends = _slot(linear.weight), torch.tensor(counts).cumsum(0).tolist()
    for step in range(STEPS):
        x, dy = _draw(ends[-1], 16, seed=step), _draw(ends[-1], 24, seed=100 + step)
        Local(compute)(x.requires_grad_(), Groups(counts), [linear])[0].backward(dy)
        for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            truth[expert] += dy[start:stop].double().t() @ x[start:stop].detach().double()
    return _error(slot.buffer, truth)


def _of_a_head() -> float:
    """Against the same head, whose logits and their gradients are bf16 too, with a sum per chunk in fp64."""
    weight, labels = _draw(64, 32, seed=0).requires_grad_(), torch.arange(96) % 64
    slot, truth, head = _slot(weight), torch.zeros(64, 32).double(), VocabHead(VocabShard.whole(64), chunk=16)
    add = Slot.add_matmul

    def counted(self: Slot, dy: Tensor, x: Tensor) -> None:
        truth.add_(dy.double().t() @ x.double())
        add(self, dy, x)

    Slot.add_matmul = counted  # type: ignore[method-assign]
    try:
        for step in range(STEPS):
            head.loss(_draw(96, 32, seed=step).requires_grad_(), weight, labels, 1.0).backward()
    finally:
        Slot.add_matmul = add  # type: ignore[method-assign]
    return _error(slot.buffer, truth)


CASES: dict[str, Callable[[], float]] = {
    "linear": _of_a_linear,
    "loop": lambda: _of_experts("loop", (30, 0, 50)),
    "bmm": lambda: _of_experts("bmm", (40, 40, 40)),
    "grouped_mm": lambda: _of_experts("grouped_mm", (2 * grouped_gemm.LONG_ROWS, 40, grouped_gemm.LONG_ROWS)),
    "head": _of_a_head,
}


@pytest.mark.parametrize("case", CASES)
def test_where_the_device_can_products_lose_nothing(exact, case):
    assert CASES[case]() < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_elsewhere_they_are_rounded_once_a_microbatch(case):
    assert 1e-6 < CASES[case]() < 2.5e-3


@pytest.mark.parametrize("fresh", [True, False])
def test_torch_has_these_products(monkeypatch, fresh):
    """Their forms, on the device that computes nothing; a GPU's own are not known here."""
    monkeypatch.setattr(weight_products, "_EXACT", frozenset({"meta"}))
    with torch.device("meta"):
        add_product(torch.zeros(5, 7), torch.zeros(3, 5, dtype=BF16), torch.zeros(3, 7, dtype=BF16), fresh)
        dy, x = torch.zeros(2, 3, 5, dtype=BF16), torch.zeros(2, 3, 7, dtype=BF16)
        add_products(torch.zeros(2, 5, 7), dy, x, fresh)
