"""Norms by apex, through a stand-in that does what its compiled part says it does, against our own."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pentad.configs.errors import UserError
from pentad.parallel.kernels.fused_norms import apex_norms
from tests.training import Run, job

CPU = torch.device("cpu")
CALLS: list[str] = []


def _grads(make: Any, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        held = [x.detach().float().requires_grad_() for x in inputs]
        return torch.autograd.grad(make(*held), held, dy.float())


class _Apex(types.ModuleType):
    """`fused_layer_norm_cuda`: one type for input and weights, fp32 statistics of each row, contiguous tensors."""

    def rms_forward_affine(self, x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert x.is_contiguous() and x.dtype == weight.dtype and tuple(shape) == (x.shape[-1],)
        CALLS.append("rms")
        rstd = (x.float().square().mean(-1) + eps).rsqrt()
        return (x.float() * rstd[..., None] * weight.float()).to(x.dtype), rstd.reshape(-1)

    def rms_backward_affine(
        self, dy: Tensor, rstd: Tensor, x: Tensor, shape: torch.Size, weight: Tensor, eps: float, saves_output: bool
    ) -> tuple[Tensor, ...]:
        assert dy.is_contiguous() and not saves_output and rstd.numel() * shape[0] == x.numel()
        found = _grads(lambda a, w: F.rms_norm(a, shape, w, eps), [x, weight], dy)
        return tuple(each.to(x.dtype) for each in found)

    def forward_affine(self, x: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor, eps: float) -> Any:
        assert x.is_contiguous()
        CALLS.append("layer")
        mean, var = x.float().mean(-1), x.float().var(-1, correction=0)
        y = F.layer_norm(x.float(), shape, weight.float(), bias.float(), eps).to(x.dtype)
        return y, mean.reshape(-1), (var + eps).rsqrt().reshape(-1)

    def backward_affine(
        self,
        dy: Tensor,
        mean: Tensor,
        rstd: Tensor,
        x: Tensor,
        shape: torch.Size,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        saves_output: bool,
    ) -> tuple[Tensor, ...]:
        assert dy.is_contiguous() and not saves_output and mean.numel() == rstd.numel()
        found = _grads(lambda a, w, b: F.layer_norm(a, shape, w, b, eps), [x, weight, bias], dy)
        return tuple(each.to(x.dtype) for each in found)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> _Apex:
    CALLS.clear()
    installed = _Apex("fused_layer_norm_cuda")
    for module in (installed, types.ModuleType("apex")):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return installed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_norms_are_those_of_torch(apex: _Apex, dtype: torch.dtype) -> None:
    kernels, draws = apex_norms(CPU, dtype), torch.Generator().manual_seed(1)
    x, w, b, dy = (torch.randn(*shape, generator=draws).to(dtype) for shape in ((7, 32), (32,), (32,), (7, 32)))
    limit = 1e-5 if dtype == torch.float32 else 0.04
    for ours, theirs, count in (
        (lambda a, s: kernels.rms(a, s, 1e-5), lambda a, s: F.rms_norm(a, (32,), s, 1e-5), 2),
        (lambda a, s, c: kernels.layer(a, s, c, 1e-5), lambda a, s, c: F.layer_norm(a, (32,), s, c, 1e-5), 3),
    ):
        mine = [each.clone().requires_grad_() for each in (x, w, b)[:count]]
        exact = [each.double().requires_grad_() for each in (x, w, b)[:count]]
        pairs = [(ours(*mine), theirs(*exact))]
        grads = torch.autograd.grad(pairs[0][0], mine, dy), torch.autograd.grad(pairs[0][1], exact, dy.double())
        pairs += zip(*grads, strict=True)
        for got, want in pairs:
            assert float((got.double() - want).abs().max() / want.abs().max()) < limit


@pytest.mark.parametrize("wrong", ["rms_forward_affine", "rms_backward_affine", "forward_affine", "backward_affine"])
def test_kernels_that_compute_something_else_are_refused(
    apex: _Apex, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(apex, wrong)
    monkeypatch.setattr(apex, wrong, lambda *args: (right(*args)[0] * 1.01, *right(*args)[1:]), raising=False)
    with pytest.raises(UserError, match=r"model\.norm_impl: apex, as installed, does not compute .*Norm as it should"):
        apex_norms(CPU, torch.float32)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_model_trains_with_them_as_with_ours(apex: _Apex, norm: str) -> None:
    """Weight gradients go the way that they always go; nothing else asks apex."""
    curves = []
    for impl in ("torch", "apex"):
        run = Run(0, job(model={"norm": norm, "norm_impl": impl, "qk_norm": True}, dtype="fp32", global_batch=4))
        CALLS.clear()
        curves.append([run.step(step)[:2] for step in range(3)])
        run.close()
        used = set(CALLS)
        assert used == (set() if impl == "torch" else {"rms", norm})
    for mine, theirs in zip(*curves, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
