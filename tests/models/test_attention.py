"""Attention cores against plain softmax attention, masks block by block, rotary angles against transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pentad.configs.resolve import yarn_scale
from pentad.configs.schema import RopeConfig
from pentad.models.attention import attend
from pentad.models.functional import rms_norm, rotate, swiglu, swiglu_clipped
from pentad.models.rope import angles, frequencies
from pentad.models.transformer import Transformer
from pentad.models.weights.initialise import initialise
from pentad.parallel.kernels.attention import attention
from pentad.parallel.kernels.blockwise import Blockwise
from pentad.parallel.kernels.interfaces import AttentionCall
from pentad.parallel.kernels.mask import Mask, TokenIndex, TokenLayout
from pentad.parallel.kernels.plain_maths import PlainMaths
from tests.training import TINY


def plain(q, k, v, mask: Mask, scale=None, sinks=None):
    """Softmax attention, written out."""
    documents = mask.keys.documents
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    for i in range(length):
        for j in range(length):
            gone = j > i or (mask.window is not None and i - j >= mask.window)
            if gone:
                scores[:, :, i, j] = -torch.inf
            elif documents is not None:
                scores[documents[:, i] != documents[:, j], :, i, j] = -torch.inf
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1)[..., :length], v)


def _documents(batch: int, length: int) -> torch.Tensor:
    draws = torch.rand(batch, length, generator=torch.Generator().manual_seed(3))
    return torch.cumsum(draws < 0.2, dim=1).int()


@pytest.mark.parametrize("local", [PlainMaths(), Blockwise()], ids=["plain", "blockwise"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(1, 2, 2), (21, 4, 2), (70, 2, 1)])
@pytest.mark.parametrize("masking", ["causal", "window", "documents", "both"])
def test_cores(local, length, heads, kv_heads, masking):
    documents = _documents(2, length) if masking in ("documents", "both") else None
    mask = Mask.of(TokenIndex.whole(length, documents), 5 if masking in ("window", "both") else None)
    draws = torch.Generator().manual_seed(0)
    shapes = [(2, length, n, 8) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, generator=draws, dtype=torch.float64, requires_grad=True) for s in shapes)
    weight = torch.randn(shapes[0], generator=draws, dtype=torch.float64)
    expected, found = plain(q, k, v, mask), attention(local, q, k, v, mask, 8**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(found, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("local", [PlainMaths(), Blockwise()], ids=["plain", "blockwise"])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "value"), [(4, 2, 8, 8), (2, 2, 12, 8), (2, 2, 4, 16)])
@pytest.mark.parametrize("masking", ["causal", "window", "both"])
@pytest.mark.parametrize("sink", [None, 0.0, 50.0, 2000.0])
def test_sinks_scale_and_width_of_values(local, heads, kv_heads, width, value, masking, sink):
    """Sinks of 50 outweigh every key by far, and next to sinks of 2000 keys weigh nothing, without a NaN."""
    length = 70
    rows = TokenIndex.whole(length, _documents(2, length) if masking == "both" else None)
    mask = Mask.of(rows, None if masking == "causal" else 5)
    draws = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, width), (2, length, kv_heads, width), (2, length, kv_heads, value)]
    q, k, v = (torch.randn(s, generator=draws, dtype=torch.float64, requires_grad=True) for s in shapes)
    inputs = [q, k, v]
    weight = torch.randn(2, length, heads, value, generator=draws, dtype=torch.float64)
    sinks = None
    if sink is not None:
        sinks = (torch.randn(heads, generator=draws, dtype=torch.float64) + sink).requires_grad_()
        inputs.append(sinks)
    expected = plain(q, k, v, mask, 0.7, sinks)
    found = attention(local, q, k, v, mask, 0.7, sinks)
    assert found.shape == weight.shape
    size = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12 * size)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11 * theirs.abs().max().item())


@pytest.mark.parametrize("local", [PlainMaths(), Blockwise()], ids=["plain", "blockwise"])
def test_sinks_in_bf16_are_as_exact_as_attention_without(local):
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, h, 24, generator=draws).bfloat16() for h in (4, 2, 2))
    sinks = torch.tensor([-2.0, 0.0, 3.0, 8.0]).bfloat16()
    mask = Mask.of(TokenIndex.whole(150))
    for given in (None, sinks):
        wide = None if given is None else given.double()
        truth = plain(q.double(), k.double(), v.double(), mask, 0.2, wide)
        error = torch.linalg.vector_norm(attention(local, q, k, v, mask, 0.2, given) - truth, dim=(0, 1, 3))
        assert (error / torch.linalg.vector_norm(truth, dim=(0, 1, 3)) < 5e-3).all()


def test_a_layer_has_the_window_that_the_config_gives_it():
    cfg = replace(TINY, window=3, window_every=2, layers=4)
    model = Transformer(cfg)
    seen = []

    def core(q, k, v, call):
        seen.append(call.window)
        return attend(q, k, v, call)

    for layer in model.layers.values():
        layer.attention.core = core  # pyright: ignore
    initialise(model, cfg)
    model(torch.zeros(1, 8, dtype=torch.long))
    assert seen == [3, None, 3, None]


def test_blockwise_in_bf16_is_as_near_to_the_truth_as_torch():
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, h, 16, generator=draws) for h in (4, 2, 2))
    call = AttentionCall(TokenLayout((TokenIndex.whole(150),)), None, 0.25)
    truth = attend(q.double(), k.double(), v.double(), call)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    error = (attend(q, k, v, call) - truth).norm() / truth.norm()
    qs, ks, vs = (x.transpose(1, 2) for x in (q, k, v))
    torchs = F.scaled_dot_product_attention(qs, ks, vs, None, 0.0, True, scale=0.25, enable_gqa=True)
    theirs = (torchs.transpose(1, 2) - truth).norm() / truth.norm()
    assert error < 1.3 * theirs


@pytest.mark.parametrize("function", ["rms_norm", "swiglu", "swiglu_clipped", "rotate"])
def test_handwritten_backward(function):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=draws, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 3, 8, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=draws, dtype=torch.float64, requires_grad=True)
    freq, factor = frequencies(RopeConfig(), 8)
    cos, sin = angles(freq, factor, torch.arange(5), torch.float64)
    match function:
        case "rms_norm":
            expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
            torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
            assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-5), (x, weight))
        case "swiglu":
            torch.testing.assert_close(swiglu(x, y), torch.sigmoid(x) * x * y)
            assert torch.autograd.gradcheck(swiglu, (x, y))
        case "swiglu_clipped":
            gate, up = (8 * t.detach() for t in (x, y))  # many beyond the limit of 7
            assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any()
            g, u = gate.clamp(max=7), up.clamp(-7, 7)
            torch.testing.assert_close(swiglu_clipped(gate, up), (u + 1) * g * torch.sigmoid(1.702 * g))
            assert torch.autograd.gradcheck(swiglu_clipped, (gate.requires_grad_(), up.requires_grad_()))
        case _:
            turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
            torch.testing.assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
            assert torch.autograd.gradcheck(lambda a: rotate(a, cos, sin), (x,))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_of_the_last_dimensions(interleaved):
    """The first four of ten dimensions stay, the others turn in pairs."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 10, generator=draws, dtype=torch.float64, requires_grad=True)
    freq, factor = frequencies(RopeConfig(), 6)
    cos, sin = angles(freq, factor, torch.arange(5), torch.float64)
    still, turning = x[..., :4], x[..., 4:]
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    pairs = torch.stack((turned.real, turned.imag), -1)
    expected = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved), torch.cat((still, expected), -1))
    assert torch.autograd.gradcheck(lambda a: rotate(a, cos, sin, interleaved), (x,))


def test_rms_norm_of_a_part_uses_the_sums_of_the_whole():
    """Two halves that are told each other's sums give the norm of the whole, forward and backward."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=draws, dtype=torch.float64)
    weight = torch.randn(8, generator=draws, dtype=torch.float64)
    dy = torch.randn(5, 8, generator=draws, dtype=torch.float64)

    def run(part: slice, total) -> tuple[torch.Tensor, ...]:
        inputs = x[:, part].clone().requires_grad_(), weight[part].clone().requires_grad_()
        y = rms_norm(*inputs, 1e-5, 8, total)
        return y, *torch.autograd.grad(y, inputs, dy[:, part])

    expected = run(slice(0, 8), None)
    squares = x.square().sum(-1, keepdim=True)
    unit = x / (squares / 8 + 1e-5).sqrt()
    sums = [squares, (dy * unit * weight).sum(-1, keepdim=True)]
    for part in (slice(0, 3), slice(3, 8)):
        known = iter(sums)
        found = run(part, lambda partial, known=known: next(known).clone())
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs[..., part], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeConfig(theta=1e4), {"rope_type": "default", "rope_theta": 1e4}),
        (
            RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_positions=64),
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            RopeConfig(theta=1e4, scaling="yarn", factor=4.0, original_positions=64, attention_factor=yarn_scale(4.0)),
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            RopeConfig(theta=15e4, scaling="yarn", factor=32.0, original_positions=4096, truncate=False,
                       attention_factor=yarn_scale(32.0)),
            {"rope_type": "yarn", "rope_theta": 15e4, "factor": 32.0, "original_max_position_embeddings": 4096,
             "truncate": False},
        ),
    ],
    ids=["plain", "llama3", "yarn", "unrounded"],
)  # fmt: skip
def test_frequencies_equal_transformers(rope, parameters):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=256, rope_parameters=parameters
    )
    theirs = LlamaRotaryEmbedding(config)
    freq, factor = frequencies(rope, 64)
    torch.testing.assert_close(freq.float(), theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)
