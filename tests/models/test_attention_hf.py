"""Attention with sinks, and with norms over all heads, against transformers' modules (tiny random weights)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pentad.configs.resolve import yarn_scale
from pentad.configs.schema import ModelConfig, RopeConfig
from pentad.models.attention import Attention
from pentad.models.rope import angles, frequencies
from pentad.models.sequences import Sequences
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout

BATCH, LENGTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2, 21, 32, 4, 2, 8
SIZES = {"hidden": HIDDEN, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "layers": 2, "ffn": 8}
NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}


def _randomise(module: nn.Module) -> None:
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=draws, dtype=param.dtype) * 0.3)


def _copied(mine: nn.Module, theirs: nn.Module) -> None:
    """Every parameter of ours from theirs, and none of theirs left over."""
    taken = {}
    for name, value in theirs.state_dict().items():
        head, _, leaf = name.partition(".")
        taken[".".join(filter(None, (next((n for n, t in NAMES.items() if t == head), head), leaf)))] = value
    mine.load_state_dict(taken, strict=True)


def _grads(module: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(BATCH * LENGTH * HIDDEN, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(y.reshape(-1), [x, *module.parameters()], weight)
    return dict(zip(["x", *names], grads, strict=True))


def _compare(cfg: ModelConfig, layer: int, theirs: Any, rotary: nn.Module, doubled: bool, tolerance: float) -> None:
    """`doubled`: their angles come once per dimension, not once per pair."""
    window = cfg.window_of(layer)
    theirs, rotary = theirs.double(), rotary.double()
    _randomise(theirs)
    mine = Attention(cfg, layer).double()
    _copied(mine, theirs)
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = torch.arange(LENGTH)
    freq, factor = frequencies(cfg.rope, HEAD_DIM)
    cos, sin = angles(freq, factor, positions, torch.float64)
    # Their angles are rounded to fp32; ours go into their module, after a look at how far apart they are.
    half = (cos, sin)
    for ours, rounded in zip(half, rotary(x, positions[None]), strict=True):
        torch.testing.assert_close(ours[:, :, 0], rounded[..., : HEAD_DIM // 2], rtol=0, atol=2e-6)
    embeddings = tuple(torch.cat((t, t) if doubled else (t,), -1)[:, :, 0] for t in half)
    gone = positions[None, :] > positions[:, None]
    if window is not None:
        gone |= positions[None, :] <= positions[:, None] - window
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill_(gone, float("-inf"))[None, None]
    x.requires_grad_()
    expected = theirs(x, embeddings, mask)[0]
    found = mine(x.reshape(-1, HIDDEN), Sequences(BATCH, LENGTH, cos, sin, TokenLayout((TokenIndex.whole(LENGTH),))))
    torch.testing.assert_close(found, expected.reshape(-1, HIDDEN), rtol=10 * tolerance, atol=tolerance)
    ours, others = _grads(mine, found, x), _grads(theirs, expected, x)
    assert len(ours) == len(others)
    for name, grad in ours.items():
        head, _, leaf = name.partition(".")
        other = others[".".join(filter(None, (NAMES.get(head, head), leaf)))]
        torch.testing.assert_close(grad, other, rtol=100 * tolerance, atol=10 * tolerance, msg=name)


@pytest.mark.parametrize("layer", [0, 1])
def test_gpt_oss(layer):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    parameters = {"rope_type": "yarn", "rope_theta": 15e4, "factor": 8.0, "original_max_position_embeddings": 16,
                  "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}  # fmt: skip
    config = GptOssConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        num_hidden_layers=2, sliding_window=5, max_position_embeddings=128, rope_parameters=parameters,
    )  # fmt: skip
    config._attn_implementation = "eager"
    rope = RopeConfig(theta=15e4, scaling="yarn", factor=8.0, original_positions=16, beta_fast=4.0, truncate=False)
    rope = replace(rope, attention_factor=yarn_scale(8.0))
    cfg = ModelConfig(**SIZES, rope=rope, sinks=True, qkv_bias=True, out_bias=True, window=5, window_every=2)  # type: ignore[arg-type]
    theirs = GptOssAttention(config, layer)
    assert theirs.sliding_window == cfg.window_of(layer)
    _compare(cfg, layer, theirs, GptOssRotaryEmbedding(config), doubled=False, tolerance=1e-11)


def test_olmoe():
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRotaryEmbedding

    config = OlmoeConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=2,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config._attn_implementation = "eager"
    cfg = ModelConfig(**SIZES, qk_norm=True, qk_norm_whole=True, norm_eps=1e-5)  # type: ignore[arg-type]
    # Their norms and softmax are in fp32 whatever the type.
    _compare(cfg, 0, OlmoeAttention(config, 0), OlmoeRotaryEmbedding(config), doubled=True, tolerance=1e-6)
