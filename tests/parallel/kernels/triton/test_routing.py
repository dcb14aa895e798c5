"""Routers by kernels in Triton, run by its interpreter, against the same routers by torch's operators in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pentad.configs.schema import MoeConfig, RouterConfig
from pentad.models.routing.router import Router, RouterKernels
from pentad.models.sequences import Sequences
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout
from pentad.parallel.kernels.triton.routing import triton_route, triton_route_settle, triton_route_totals
from tests.parallel.kernels.triton.test_kernels import DEVICE
from tests.training import TINY

KERNELS = RouterKernels(triton_route, triton_route_totals, triton_route_settle)
LENGTH = 37


def _router(experts: int, top_k: int, dtype: torch.dtype, **router: Any) -> Router:
    moe = MoeConfig(experts=experts, top_k=top_k, router=RouterConfig(**router))
    made = Router(replace(TINY, moe=moe), index=2).to(dtype)
    draws = torch.Generator().manual_seed(0)
    for param in made.parameters():
        param.data = torch.randn(param.shape, generator=draws).mul(0.5).to(dtype)
    if made.selection_bias is not None:
        made.selection_bias = torch.linspace(0.2, -0.2, experts)
    return made.to(DEVICE)


def _sequences(share: float, kept: dict[int, Any] | None = None) -> Sequences:
    places, layout = torch.arange(2 * LENGTH, device=DEVICE), TokenLayout((TokenIndex.whole(LENGTH),))
    return Sequences(2, LENGTH, None, None, layout, places // LENGTH, share, kept, places)


def _outcome(router: Router, seq: Sequences, again: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The experts, and weights, tally and gradients of one pass, or of that and one more."""
    x = torch.randn(2 * LENGTH, TINY.hidden, generator=torch.Generator().manual_seed(1)).to(DEVICE, router.weight.dtype)
    x.requires_grad_()
    routing = router(x, seq)
    if again:
        routing = router(x, seq)
    dy = torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(2)).to(x)
    return routing.experts, [
        routing.weights,
        router.tally.clone(),
        *torch.autograd.grad(routing.weights, (x, *router.parameters()), dy),
    ]


FORMS: list[tuple[int, int, dict[str, Any]]] = [
    (8, 2, {"score": "softmax", "normalize": True, "aux_loss": 0.3, "z_loss": 0.02}),
    (5, 1, {"score": "softmax", "normalize": False, "scale": 2.5, "aux_loss": 0.3, "logit_bias": True}),
    (40, 3, {"score": "sigmoid", "normalize": True, "selection_bias": True, "scale": 1.5, "aux_loss": 0.1}),
    (8, 3, {"score": "sigmoid", "normalize": False, "groups": 4, "groups_kept": 2, "z_loss": 0.1}),
    (6, 2, {"score": "softmax", "normalize": True, "aux_loss": 0.3, "aux_level": "global_batch"}),
    (4, 4, {"score": "sigmoid", "normalize": True}),
    (8, 2, {"score": "softmax", "normalize": False, "aux_loss": 0.3, "aux_level": "sequence"}),
    (6, 2, {"score": "sigmoid", "selection_bias": True, "aux_loss": 0.3, "aux_level": "sequence", "z_loss": 0.02}),
]


@pytest.mark.parametrize(("share", "again"), [(0.25, False), (0.25, True), (0.0, False)])
@pytest.mark.parametrize(("experts", "top_k", "form"), FORMS)
def test_a_router_by_kernels_is_the_same_router(
    experts: int, top_k: int, form: dict[str, Any], share: float, again: bool
) -> None:
    outcomes = []
    for kernels, dtype in ((KERNELS, torch.float32), (None, torch.float64)):
        router = _router(experts, top_k, dtype, **form)
        router.kernels = kernels
        if router.load is not None:
            router.load.copy_(torch.arange(experts) / (experts * (experts - 1) / 2))
        outcomes.append(_outcome(router, _sequences(share, {} if again else None), again))
    (experts_found, found), (experts_expected, expected) = outcomes
    assert torch.equal(experts_found, experts_expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=2e-5, atol=2e-6)


def test_loads_are_even_before_the_first_step() -> None:
    router = _router(4, 2, torch.float32, aux_loss=1.0, aux_level="global_batch")
    router.kernels = KERNELS
    seq = _sequences(1.0, {})
    _outcome(router, seq)
    assert seq.kept is not None and torch.equal(seq.kept[2].loads, torch.full((4,), 0.25, device=DEVICE))


@pytest.mark.parametrize(
    "form",
    [{"name": "expert_choice"}, {"null_experts": 2}, {"name": "sinkhorn"}],
)
def test_other_routers_are_left_to_torch(form: dict[str, Any]) -> None:
    router = _router(4, 2, torch.float32, **form)
    router.kernels = RouterKernels(*(lambda *_: pytest.fail("a kernel was called") for _ in range(3)))  # pyright: ignore
    _outcome(router, _sequences(1.0))
