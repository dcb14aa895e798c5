"""What bf16 models compute in fp32 inside: the exact result rounded once, or no worse than in transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pentad.configs.resolve import yarn_scale
from pentad.configs.schema import RopeConfig
from pentad.models.dropout import Draws
from pentad.models.functional import rms_norm, rotate, swiglu, swiglu_clipped
from pentad.models.linear import Linear
from pentad.models.norms import LayerNorm
from pentad.models.rope import angles, frequencies
from pentad.parallel.gradients import Slot, give_slot
from pentad.parallel.kernels.blockwise import Blockwise
from pentad.parallel.kernels.mask import Mask, TokenIndex
from pentad.parallel.kernels.merge import add_sinks
from pentad.parallel.vocab import look_up

BF16, EPS, ROWS, WIDTH = torch.bfloat16, 1e-5, 300, 512


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def _error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def _scale_error(found: Tensor, truth: Tensor) -> float:
    """How far rows are stretched as wholes, on average: what roundings of single elements leave alone."""
    return ((found.double() * truth).sum(-1) / truth.square().sum(-1) - 1).abs().mean().item()


def _rounded_once(found: Tensor, truth: Tensor) -> bool:
    """All but the elements that lie halfway between two numbers, as fp32 can tell."""
    return found.dtype == BF16 and (found == truth.to(BF16)).double().mean().item() > 0.99


def _with_slot(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> tuple[nn.Parameter, Slot]:
    param = nn.Parameter(1 + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype))
    slot = Slot(torch.zeros(shape), lambda: None)
    slot.start_step(1)
    give_slot(param, slot)
    return param, slot


def _exact_norm(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.double().requires_grad_(), weight.detach().double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    dx, dweight = torch.autograd.grad(y, (x, weight), dy.double())
    return y.detach(), dx, dweight


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (2, 50, 8, 64)])
@pytest.mark.parametrize("summed", [False, True])
def test_rms_norm_is_rounded_once(shape, summed):
    """Forward and backward, over rows and heads, with the sums made at once or by the seam of split rows."""
    x, dy = _draw(*shape).requires_grad_(), _draw(*shape, seed=1)
    weight, slot = _with_slot(shape[-1:])
    y = rms_norm(x, weight, EPS, total=(lambda sums: sums) if summed else None)
    y.backward(dy)
    assert x.grad is not None
    truth = _exact_norm(x.detach(), weight, dy)
    assert _rounded_once(y, truth[0]) and _rounded_once(x.grad, truth[1])
    assert _error(slot.buffer, truth[2]) < 1e-6
    assert _scale_error(y, truth[0]) < 3e-4


def test_rms_norm_is_nearer_to_the_exact_one_than_that_of_transformers():
    x, norm = _draw(ROWS, WIDTH), LlamaRMSNorm(WIDTH, EPS).to(BF16)
    norm.weight.data = _with_slot((WIDTH,))[0].data
    truth, *_ = _exact_norm(x, norm.weight, x)
    assert _error(rms_norm(x, norm.weight, EPS), truth) < _error(norm(x), truth)


def test_rms_norm_of_strided_rows_and_of_none():
    low = _draw(40, 96)
    latent = low.split((64, 32), dim=-1)[0]
    weight = torch.ones(64, dtype=BF16)
    assert torch.equal(rms_norm(latent, weight, EPS), rms_norm(latent.contiguous(), weight, EPS))
    empty = torch.zeros(0, 64, dtype=BF16, requires_grad=True)
    rms_norm(empty, weight, EPS, total=lambda sums: sums).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_that_of_its_type(dtype):
    x, dy, weight = _draw(ROWS, WIDTH).to(dtype), _draw(ROWS, WIDTH, seed=1).to(dtype), torch.ones(WIDTH, dtype=dtype)
    y = rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS)
    y.backward(dy)
    assert x.grad is not None and weight.grad is not None
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-15}[dtype]
    truth = _exact_norm(x.detach(), weight, dy)
    for mine, exact in zip((y, x.grad, weight.grad), truth, strict=True):
        assert mine.dtype == dtype and _error(mine, exact) < tolerance
    cos, sin = angles(*frequencies(RopeConfig(), 64), torch.arange(7), dtype)
    assert cos.dtype == sin.dtype == dtype


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turning", [64, 24])
def test_rotary_embedding_is_rounded_once(interleaved, turning):
    shape = (2, 700, 4, 64)
    q, dq = _draw(*shape).requires_grad_(), _draw(*shape, seed=1)
    freq = frequencies(RopeConfig(scaling="yarn", factor=4.0, attention_factor=yarn_scale(4.0)), turning)
    cos, sin = angles(*freq, torch.arange(700), BF16)
    assert cos.dtype == torch.float32
    exact = angles(*freq, torch.arange(700), torch.float64)
    wide = q.detach().double().requires_grad_()
    y, truth = rotate(q, cos, sin, interleaved), rotate(wide, *exact, interleaved)
    y.backward(dq)
    truth.backward(dq.double())
    assert q.grad is not None and wide.grad is not None
    assert _rounded_once(y, truth.detach()) and _rounded_once(q.grad, wide.grad)


def test_rotary_embedding_is_nearer_to_the_exact_one_than_that_of_transformers():
    q, freq = _draw(1, 700, 4, 64), frequencies(RopeConfig(), 64)
    truth = rotate(q.double(), *angles(*freq, torch.arange(700), torch.float64))
    cos, sin = (torch.cat((x, x), -1)[:, :, 0].to(BF16) for x in angles(*freq, torch.arange(700), torch.float64))
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)[0].transpose(1, 2)
    assert _error(rotate(q, *angles(*freq, torch.arange(700), BF16)), truth) < 0.8 * _error(theirs, truth)


def test_layer_norm_is_rounded_once():
    x, norm = _draw(ROWS, WIDTH), LayerNorm(WIDTH, EPS)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    truth = F.layer_norm(x.double(), (WIDTH,), eps=EPS)
    assert _rounded_once(norm.to(BF16)(x), truth)


def test_gated_activations_are_as_exact_as_those_of_transformers():
    gate, up = 3 * _draw(ROWS, WIDTH), _draw(ROWS, WIDTH, seed=1)
    exact = swiglu(gate.double(), up.double())
    assert _error(swiglu(gate, up), exact) <= 1.01 * _error(F.silu(gate) * up, exact)
    clipped = gate.clamp(max=7.0)
    theirs = (up.clamp(-7.0, 7.0) + 1) * (clipped * torch.sigmoid(clipped * 1.702))
    exact = swiglu_clipped(gate.double(), up.double())
    assert _error(swiglu_clipped(gate, up), exact) < _error(theirs, exact)


def test_the_clipped_activation_is_rounded_once():
    gate, up, dy = 3 * _draw(ROWS, WIDTH), _draw(ROWS, WIDTH, seed=1), _draw(ROWS, WIDTH, seed=2)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    y, exact = swiglu_clipped(gate, up), swiglu_clipped(*wide)
    y.backward(dy)
    exact.backward(dy.double())
    assert _rounded_once(y, exact.detach())
    for mine, truth in zip((gate, up), wide, strict=True):
        assert mine.grad is not None and truth.grad is not None and _rounded_once(mine.grad, truth.grad)


def test_attention_does_not_stretch_rows():
    """Sums of probabilities, and the part that sinks leave, are factors of whole heads."""
    q, k, v = (_draw(1, 200, 4, 32, seed=seed) for seed in range(3))
    mask, scale, sinks = Mask.of(TokenIndex.whole(200)), 32**-0.5, torch.linspace(-1, 3, 4).to(BF16)
    out, lse = Blockwise().forward(q, k, v, mask, scale)
    exact, exact_lse = Blockwise().forward(q.double(), k.double(), v.double(), mask, scale)
    assert _scale_error(out, exact) < 9e-4
    wide = out.double(), lse.double()
    assert _rounded_once(add_sinks(out, lse, sinks)[0], add_sinks(*wide, sinks.double())[0])
    assert torch.allclose(lse.double(), exact_lse, atol=1e-5)


def test_dropout_keeps_the_mean():
    x = _draw(64, WIDTH).abs()
    draws = Draws(0.1, 0, 0, (0,), 64, torch.arange(64))
    y = draws.drop(x, 0)
    assert _rounded_once(y, torch.where(y == 0, 0.0, x.double() / 0.9))


def test_gradients_of_biases_and_of_learned_positions_are_summed_in_fp32():
    linear, x, dy = Linear(8, 16, bias=True).to(BF16), _draw(ROWS, 8), _draw(ROWS, 16, seed=1) + 1
    linear.weight.data = _draw(16, 8)
    linear.bias, slot = _with_slot((16,))
    linear(x.requires_grad_()).backward(dy)
    assert _error(slot.buffer, dy.double().sum(0)) < 1e-6
    table, slot = _with_slot((4, 16))
    look_up(torch.arange(ROWS) % 4, table).backward(dy)
    assert _error(slot.buffer, dy.double().view(-1, 4, 16).sum(0)) < 1e-6
