"""Gated linear attention: the chunked form against the recurrence, written out token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pentad.configs.errors import UserError
from pentad.configs.schema import LinearAttentionConfig
from pentad.models.costs.flops import flops_per_token, layer_flops, mean_pairs
from pentad.models.hf.families import hf_family
from pentad.models.linear_attention import LinearAttention, gated_linear_attention
from pentad.models.sequences import Sequences
from pentad.models.transformer import Transformer
from pentad.models.weights.initialise import initialise
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout
from tests.same_training import check
from tests.training import TINY

LINEAR = {"attention_every": 2, "linear": LinearAttentionConfig(key_dim=4, value_dim=6, gate_rank=3, chunk=8)}


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, documents: Tensor | None = None) -> Tensor:
    """One token after the other."""
    state, outs = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state
        if documents is not None and t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        state = state + k[:, t][..., None] * v[:, t][..., None, :]
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(outs, 1)


def inputs(length: int, dtype: torch.dtype = torch.float64, strength: float = 0.3) -> list[Tensor]:
    """q, k, v, g and a gradient of the output."""
    draws = torch.Generator().manual_seed(length)
    q, k = (torch.randn(2, length, 3, 5, generator=draws, dtype=torch.float64) for _ in range(2))
    v, dout = (torch.randn(2, length, 3, 7, generator=draws, dtype=torch.float64) for _ in range(2))
    g = -strength * torch.rand(2, length, 3, 5, generator=draws, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, g, dout)]


def documents_of(length: int) -> Tensor:
    """Many documents of one token, and a few long ones."""
    draws = torch.rand(2, length, generator=torch.Generator().manual_seed(3))
    often = torch.arange(length) % 40 < 12
    return torch.cumsum(draws < torch.where(often, 0.6, 0.03), dim=1).int()


def run(function, tensors: list[Tensor], documents: Tensor | None, **settings) -> list[Tensor]:
    """The output and all gradients."""
    *leaves, dout = (x.clone() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves, documents, **settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (7, 1), (16, 16), (50, 8), (67, 16), (131, 64), (90, 128)])
def test_equals_the_recurrence(length, chunk, packed):
    tensors, documents = inputs(length), documents_of(length) if packed else None
    expected = run(recurrence, tensors, documents)
    for mine, theirs in zip(run(gated_linear_attention, tensors, documents, chunk=chunk), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_every_token_a_document():
    q, k, v, g, dout = inputs(21)
    out, *_, dg = run(gated_linear_attention, [q, k, v, g, dout], torch.arange(21).expand(2, -1), chunk=8)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v * 5**-0.5, rtol=1e-13, atol=1e-13)
    assert not dg.any()


@pytest.mark.parametrize("strength", [3.0, 60.0, 1e4])
def test_strong_decays_in_fp32(strength):
    """A chunk decays by up to e^-640000; every error is relative to the true value's norm."""
    tensors = inputs(150, torch.float32, strength)
    tensors[3][:, ::3] *= 1e-4  # weak ones between strong ones: sums from afar would drown them
    expected = run(recurrence, [x.double() for x in tensors], None)
    for mine, theirs in zip(run(gated_linear_attention, tensors, None), expected, strict=True):
        assert mine.isfinite().all()
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


def test_a_decay_to_zero_forgets():
    q, k, v, g, dout = inputs(40)
    documents = documents_of(40)
    gone = torch.zeros(2, 40, dtype=torch.bool)
    gone[:, 1:] = documents[:, 1:] != documents[:, :-1]
    zero = [q, k, v, g.masked_fill(gone[..., None, None], -torch.inf), dout]
    reset = run(gated_linear_attention, [q, k, v, g, dout], documents, chunk=16)
    for mine, theirs in zip(run(gated_linear_attention, zero, None, chunk=16), reset, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_bf16_is_as_near_to_the_truth_as_its_inputs():
    tensors = inputs(150, torch.bfloat16)
    expected = run(recurrence, [x.double() for x in tensors], None)
    for mine, theirs in zip(run(gated_linear_attention, tensors, None), expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 4e-3 * theirs.norm()


def test_backward_keeps_inputs_only():
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    leaves = [x.requires_grad_() for x in inputs(128)[:4]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gated_linear_attention(*leaves, chunk=16)
    assert kept == sum(x.numel() for x in leaves)


def _model(**settings) -> Transformer:
    cfg = replace(TINY, **{"layers": 4, **LINEAR, **settings})
    model = Transformer(cfg).double()
    initialise(model, cfg)
    return model


def test_layer_is_causal_and_keeps_documents_apart():
    cfg = replace(TINY, **LINEAR)
    layer = LinearAttention(cfg, 0).double()
    for name, param in layer.named_parameters():
        torch.nn.init.ones_(param) if "norm" in name else torch.nn.init.normal_(param, std=0.3)
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(2 * 20, 32, generator=draws, dtype=torch.float64)
    documents = torch.tensor([0] * 9 + [1] * 11).expand(2, -1)
    seq = Sequences(2, 20, None, None, TokenLayout((TokenIndex.whole(20, documents),)))
    changed = x.clone()
    changed[5] += 1.0  # in document 0 of the first sequence
    moved = (layer(changed, seq) - layer(x, seq)).abs().amax(-1).view(2, 20) > 1e-9
    assert moved[0, 5:9].all() and not moved[0, :5].any() and not moved[0, 9:].any() and not moved[1].any()
    # The second document alone gives the same.
    alone = layer(
        x.view(2, 20, -1)[:, 9:].reshape(-1, 32), Sequences(2, 11, None, None, TokenLayout((TokenIndex.whole(11),)))
    )
    torch.testing.assert_close(layer(x, seq).view(2, 20, -1)[:, 9:].reshape(-1, 32), alone, rtol=1e-12, atol=1e-13)


def test_which_layers_are_linear():
    linear = [isinstance(layer.attention, LinearAttention) for layer in _model(attention_every=3).layers.values()]
    assert linear == [True, True, False, True]
    assert not any(isinstance(m, LinearAttention) for m in _model(attention_every=1).modules())


def test_flops_by_hand():
    # Of 4 heads with d = 4, e = 6 and gate rank 3: q, k 2 x 32 x 16, v, gate, out 3 x 32 x 24, decays 32 x 3 + 3 x 16.
    linear = 1024 + 2304 + 96 + 48
    softmax, state, ffn, head = 4 * 32 * 32, 2 * 4 * 4 * 6, 3 * 32 * 64, 32 * 64
    cfg = replace(TINY, **LINEAR)
    pairs = 100 * 100 / 2 * 4 * (8 + 8)
    per_layer = (2.0 * 100 * (linear + state + ffn), 2 * (100 * (softmax + ffn) + pairs), 2.0 * 100 * head)
    assert layer_flops(cfg, 100) == per_layer
    assert flops_per_token(cfg, 100) == pytest.approx(3 * sum(per_layer) / 100, rel=1e-14)
    pure = replace(cfg, attention_every=3)
    assert mean_pairs(pure, [100]) == 0
    assert flops_per_token(pure, 100) == 6 * (2 * (linear + state + ffn) + head)


def test_no_hugging_face_architecture_has_it():
    with pytest.raises(UserError, match=r"model\.attention_every: 2: linear attention cannot be exported"):
        hf_family(replace(TINY, **LINEAR))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "model": {"kv_heads": 1}},
        {"pp": 2, "pipeline": {"schedule": "zb-v", "chunks": 2}, "recompute": "full", "masked": True},
        {"tp": 2, "pp": 2, "masked": True},
    ],
)
def test_hybrid_stacks_train_like_one_process(layout):
    model = {"layers": 4, **LINEAR, **layout.pop("model", {})}
    check(**layout, model=model, steps=4)
