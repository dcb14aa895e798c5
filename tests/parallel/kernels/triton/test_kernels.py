"""Kernels in Triton, run by its interpreter, against torch in fp64: right within the rounding of their type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from pentad.models import functional
from pentad.parallel.gradients import Slot, give_slot
from pentad.parallel.kernels.triton.gates import triton_swiglu
from pentad.parallel.kernels.triton.norms import triton_rms_norm
from pentad.parallel.kernels.triton.rotary import triton_rotate
from pentad.parallel.vocab import VocabShard, cross_entropy, fused_cross_entropy
from pentad.trainer.devices.kernels import triton_problem

if torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    DEVICE = torch.device("cpu")
# Triton's interpreter cuts bf16 off where a GPU rounds.
ULP = {torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7, torch.float16: 2.0**-11}
HALF = pytest.mark.parametrize("dtype", list(ULP))


def _draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Each element is rounded once, besides fp32 errors relative to the largest."""
    assert found.dtype == dtype
    error = (found.double() - expected).abs()
    assert bool((error <= ULP[dtype] * expected.abs() + 3e-6 * expected.abs().max() + 1e-7).all())


def _both(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype) -> None:
    wide = [x.double().requires_grad_() for x in given]
    narrow = [x.clone().requires_grad_() for x in given]
    y, expected = ours(*narrow), theirs(*wide)
    dy = _draw(*y.shape, dtype=dtype, seed=9)
    _close(y.detach(), expected.detach(), dtype)
    grads = zip(torch.autograd.grad(y, narrow, dy), torch.autograd.grad(expected, wide, dy.double()), strict=True)
    for grad, reference in grads:
        _close(grad, reference, dtype)


@HALF
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 2, 96), (37, 130), (2, 1000)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = [_draw(*shape, dtype=dtype), _draw(shape[-1], dtype=dtype, seed=1)]
    _both(lambda x, w: triton_rms_norm(x, w, 1e-5), lambda x, w: functional.rms_norm(x, w, 1e-5), given, dtype)


def test_the_scale_of_a_normalised_row_is_right_to_1e_4() -> None:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float16
    x, weight = _draw(8, 4096, dtype=dtype), torch.ones(4096, dtype=dtype, device=DEVICE)
    found, expected = triton_rms_norm(x, weight, 1e-6).double(), functional.rms_norm(x.double(), weight.double(), 1e-6)
    scale = (found * expected).sum(-1) / expected.square().sum(-1)
    assert float((scale - 1).abs().max()) < 1e-4


def test_the_weights_gradient_is_added_to_its_slot_in_fp32() -> None:
    weight, total, final = nn.Parameter(_draw(48, dtype=torch.bfloat16)), torch.full((48,), 7.0, device=DEVICE), []
    slot = Slot(total, lambda: final.append(True))
    give_slot(weight, slot)
    slot.start_step(2)
    expected = torch.zeros(48, dtype=torch.float64, device=DEVICE)
    for seed in (1, 2):
        x = _draw(11, 48, dtype=torch.bfloat16, seed=seed).requires_grad_()
        y = triton_rms_norm(x, weight, 1e-5)
        y.backward(torch.ones_like(y))
        wide = x.detach().double()
        expected += (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).sum(0)
    assert final == [True] and weight.grad is None
    assert torch.allclose(total.double(), expected, rtol=1e-5, atol=1e-5)


@HALF
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1024), (7, 333)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = [_draw(*shape, dtype=dtype, scale=3.0), _draw(*shape, dtype=dtype, seed=1)]
    _both(triton_swiglu, functional.swiglu, given, dtype)


@HALF
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "pairs", "batched"), [((1, 3, 1, 2), 1, False), ((2, 5, 3, 32), 16, True), ((2, 4, 9, 24), 5, False)]
)
def test_rotate(shape: tuple[int, ...], pairs: int, batched: bool, interleaved: bool, dtype: torch.dtype) -> None:
    angle = torch.rand(shape[0] if batched else 1, shape[1], 1, pairs, dtype=torch.float64, device=DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()
    x = _draw(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)  # strided, as a view of heads is
    _both(
        lambda y: triton_rotate(y, cos.float(), sin.float(), interleaved),
        lambda y: functional.rotate(y, cos.float().double(), sin.float().double(), interleaved),
        [x],
        dtype,
    )


@HALF
@pytest.mark.parametrize(("vocab", "used"), [(1, 1), (130, 130), (2049, 2000), (5000, 5000)])
def test_cross_entropy(vocab: int, used: int, dtype: torch.dtype) -> None:
    logits = _draw(9, vocab, dtype=dtype, scale=4.0)
    labels = torch.randint(used, (9,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    labels[4] = -1
    shard = VocabShard.whole(vocab, used)
    hidden = shard.hide_padding(logits)
    loss, expected = cross_entropy(hidden.double(), labels, 0.25, shard, True)
    without, none = fused_cross_entropy(hidden.clone(), labels, 0.25, shard, False)
    found, gradient = fused_cross_entropy(hidden.clone(), labels, 0.25, shard, True)
    assert none is None and float(without) == float(found)
    assert float(found) == pytest.approx(float(loss), rel=1e-6, abs=1e-7)
    assert gradient is not None and expected is not None
    _close(gradient, expected, dtype)


def test_kernels_are_tried_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_problem(DEVICE) is None
    module = "pentad.parallel.kernels.triton.gates.triton_swiglu"
    monkeypatch.setattr(module, lambda gate, up: triton_swiglu(gate, up) * 1.1)  # and so is what its backward is given
    assert triton_problem(DEVICE) == f"Triton's kernel of SwiGLU is wrong on {DEVICE} by 0.21"
    monkeypatch.setattr(module, lambda gate, up: 1 / 0)
    assert triton_problem(DEVICE) == f"Triton's kernels do not run on {DEVICE} (ZeroDivisionError: division by zero)"
