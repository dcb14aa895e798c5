"""Attention cores against plain softmax attention, masks block by block, rotary angles against transformers."""

from __future__ import annotations

import pytest
import torch

from pentad.configs.schema import RopeConfig
from pentad.models.attention import sdpa
from pentad.models.blockwise import blockwise
from pentad.models.functional import rms_norm, rotate, swiglu
from pentad.models.masks import Mask
from pentad.models.rope import angles, frequencies


def plain(q, k, v, mask: Mask):
    """Softmax attention, written out."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    for i in range(length):
        for j in range(length):
            gone = j > i or (mask.window is not None and i - j >= mask.window)
            if gone:
                scores[:, :, i, j] = -torch.inf
            elif mask.documents is not None:
                scores[mask.documents[:, i] != mask.documents[:, j], :, i, j] = -torch.inf
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def _documents(batch: int, length: int) -> torch.Tensor:
    draws = torch.rand(batch, length, generator=torch.Generator().manual_seed(3))
    return torch.cumsum(draws < 0.2, dim=1).int()


@pytest.mark.parametrize("core", [sdpa, blockwise])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(1, 2, 2), (21, 4, 2), (70, 2, 1)])
@pytest.mark.parametrize("masking", ["causal", "window", "documents", "both"])
def test_cores(core, length, heads, kv_heads, masking):
    documents = _documents(2, length) if masking in ("documents", "both") else None
    mask = Mask(5 if masking in ("window", "both") else None, documents)
    draws = torch.Generator().manual_seed(0)
    shapes = [(2, length, n, 8) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, generator=draws, dtype=torch.float64, requires_grad=True) for s in shapes)
    weight = torch.randn(shapes[0], generator=draws, dtype=torch.float64)
    expected, found = plain(q, k, v, mask), core(q, k, v, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(found, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_blockwise_in_bf16_is_as_near_to_the_truth_as_torch():
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, h, 16, generator=draws) for h in (4, 2, 2))
    truth = sdpa(q, k, v, Mask())
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    error = (blockwise(q, k, v, Mask()) - truth).norm() / truth.norm()
    theirs = (sdpa(q, k, v, Mask()) - truth).norm() / truth.norm()
    assert error < 1.3 * theirs


@pytest.mark.parametrize("function", ["rms_norm", "swiglu", "rotate"])
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
        case _:
            turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
            torch.testing.assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
            assert torch.autograd.gradcheck(lambda a: rotate(a, cos, sin), (x,))


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
            RopeConfig(theta=1e4, scaling="yarn", factor=4.0, original_positions=64),
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
    ids=["plain", "llama3", "yarn"],
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
