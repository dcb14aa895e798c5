"""AdamW by apex, through a stand-in that does what apex's kernel says it does, against torch's own optimizer."""

from __future__ import annotations

import importlib.machinery
import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pentad.configs.errors import UserError
from pentad.configs.schema import AdamWConfig
from pentad.trainer.optim import adamw_kernels
from pentad.trainer.optim.adamw_kernels import (
    AdamUpdate,
    adamw_kernel,
    square_sum,
    squares_one_by_one,
    squares_together,
    sum_of_squares,
)
from tests.trainer.optim.test_optimizer import _groups, _torch, _train

CPU = torch.device("cpu")


def _adam_capturable(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    decay: float,
    inv_scale: Tensor,
) -> None:
    """`amp_C.multi_tensor_adam_capturable`: pointers are read as these types, and the maths is fp32."""
    assert (noop.dtype, step.dtype) == (torch.int32, torch.int32)
    assert (lr.dtype, inv_scale.dtype) == (torch.float32, torch.float32)
    if noop.item() == 1:
        return
    corrections = [1.0 - beta ** step.item() if bias_correction else 1.0 for beta in (beta1, beta2)]
    for g, p, m, v in zip(*lists, strict=True):
        grad, value = g.float() * inv_scale, p.float()
        if mode == 0:
            grad = grad + decay * value
        mean, square = beta1 * m.float() + (1 - beta1) * grad, beta2 * v.float() + (1 - beta2) * grad * grad
        update = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + epsilon)
        if mode == 1:
            update = update + decay * value
        for target, found in ((g, grad), (p, value - lr * update), (m, mean), (v, square)):
            target.copy_(found)


def _l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, Tensor]:
    """`amp_C.multi_tensor_l2norm`: the norm (1,) in fp32, and those of the tensors if they are asked for."""
    assert noop.dtype == torch.int32 and not per_tensor
    total = torch.stack([x.float().square().sum() for x in lists[0]]).sum()
    noop.fill_(int(not torch.isfinite(total)))
    return total.sqrt().view(1), torch.empty(0)


@pytest.mark.parametrize("wrong", [False, True])
def test_apex_adds_up_squares(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    _install(monkeypatch, _adam_capturable)
    kernel = (lambda *args: (_l2norm(*args)[0].square(), torch.empty(0))) if wrong else _l2norm
    monkeypatch.setattr(sys.modules["amp_C"], "multi_tensor_l2norm", kernel, raising=False)
    if wrong:
        with pytest.raises(
            UserError, match=r"optim\.impl: apex, as installed, does not add up squares.*set optim\.impl"
        ):
            square_sum(AdamWConfig(impl="apex"), CPU)
        return
    add, x = square_sum(AdamWConfig(impl="apex"), CPU), torch.randn(3000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(add([x, x]), 2 * x.double().square().sum().float(), rtol=1e-5)
    assert torch.equal(add([x.double()]), sum_of_squares(x.double())) and add([x[:0]]) == add([]) == 0
    assert square_sum(AdamWConfig(impl="fused"), CPU) is squares_one_by_one


def test_squares_of_all_gradients_at_once_are_those_of_each() -> None:
    gradients = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 1e-3 for n in (0, 1, 5000, 300_001)]
    exact = sum(float(x.double().square().sum()) for x in gradients)
    assert square_sum(AdamWConfig(), torch.device("cuda")) is squares_together
    for add in (squares_together, squares_one_by_one):
        assert float(add(gradients)) == pytest.approx(exact, rel=1e-5) and add([]) == 0
        assert torch.isnan(add([*gradients, torch.tensor([torch.nan])]))


def _install(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., None]) -> None:
    modules = {name: types.ModuleType(name) for name in ("amp_C", "apex", "apex.multi_tensor_apply")}
    modules["amp_C"].multi_tensor_adam_capturable = kernel  # type: ignore[attr-defined]
    modules["apex.multi_tensor_apply"].multi_tensor_applier = (  # type: ignore[attr-defined]
        lambda op, noop, lists, *rest: op(2048 * 32, noop, lists, *rest)
    )
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("skip_at", [-1, 0, 2])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_apex_updates_as_torch_does(monkeypatch, skip_at, eps):
    """Clipped gradients, bias correction, decoupled decay of matrices only, and steps left out."""
    _install(monkeypatch, _adam_capturable)
    cfg = AdamWConfig(impl="apex", weight_decay=0.1, eps=eps)
    expected = _torch(
        lambda p: torch.optim.AdamW(_groups(p, 0.1), lr=0.01, betas=(0.9, 0.95), eps=eps),
        torch.float32,
        skip_at=skip_at,
    )
    for mine, theirs in zip(_train(cfg, torch.float32, skip_at=skip_at), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("wrong", ["inverse scale", "order of modes", "skips nothing"])
def test_an_apex_that_computes_something_else_is_refused(monkeypatch, wrong):
    def kernel(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, correction, decay, inv_scale) -> None:
        if wrong == "inverse scale":
            inv_scale = 1 / inv_scale
        elif wrong == "order of modes":
            mode = 1 - mode
        else:
            noop = noop * 0
        _adam_capturable(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, correction, decay, inv_scale)

    _install(monkeypatch, kernel)
    with pytest.raises(UserError, match=r"optim\.impl: apex, as installed, does not compute AdamW.*set optim\.impl"):
        adamw_kernel(AdamWConfig(impl="apex"), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_takes_apex_for_what_it_can_do(monkeypatch, dtype):
    """On GPUs where it is installed; it has no fp64."""
    calls: list[torch.dtype] = []

    def kernel(chunk, noop, lists, *rest) -> None:
        calls.append(lists[1][0].dtype)
        _adam_capturable(chunk, noop, lists, *rest)

    _install(monkeypatch, kernel)
    monkeypatch.setattr(adamw_kernels, "_checked", lambda kernel, cfg, device: kernel)  # no GPU is here to check it on
    way = adamw_kernel(AdamWConfig(), torch.device("cuda"))
    value, grad, mean, square = (torch.ones(3, dtype=dtype) for _ in range(4))
    count, factor, skip = torch.ones(()), torch.ones((), dtype=dtype), torch.zeros(())
    way(AdamUpdate([value], [grad], [mean], [square], count, lr=0.1, weight_decay=0.0, factor=factor, skip=skip))
    assert calls == ([torch.float32] if dtype == torch.float32 else [])
    assert value[0] < 1 and math.isfinite(value[0])
