"""Latent attention against plain maths and against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.configs.schema import MlaConfig, ModelConfig, RopeConfig
from pentad.models.mla import LatentAttention
from pentad.models.rope import angles, frequencies
from pentad.models.sequences import Sequences
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout

BATCH, LENGTH, HIDDEN, HEADS = 2, 19, 24, 3
NOPE, ROPE, VALUE, RANK, Q_RANK = 6, 4, 5, 10, 14
NAMES = {
    "q_proj": "q",
    "q_a_proj": "q_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_up",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up",
    "o_proj": "out",
}


def config(q_rank: int | None, **settings: Any) -> ModelConfig:
    mla = MlaConfig(kv_rank=RANK, q_rank=q_rank, nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE)
    sizes = {"layers": 1, "hidden": HIDDEN, "heads": HEADS, "kv_heads": HEADS, "head_dim": NOPE + ROPE, "ffn": 8}
    return ModelConfig(**sizes, **{"mla": mla, "norm_eps": 1e-6, **settings})


def module(cfg: ModelConfig) -> LatentAttention:
    attention = LatentAttention(cfg, 0).double()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in attention.parameters():
            param.copy_(torch.randn(param.shape, generator=draws, dtype=torch.float64) * 0.4)
    return attention


def batch(cfg: ModelConfig, documents: Tensor | None = None) -> tuple[Tensor, Sequences]:
    freq, factor = frequencies(cfg.rope, ROPE)
    cos, sin = angles(freq, factor, torch.arange(LENGTH), torch.float64)
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * LENGTH, HIDDEN, generator=draws, dtype=torch.float64, requires_grad=True)
    return x, Sequences(BATCH, LENGTH, cos, sin, TokenLayout((TokenIndex.whole(LENGTH, documents),)))


def _linear(x: Tensor, linear: Any) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, linear.weight)
    return y if linear.bias is None else y + linear.bias


def _norm(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def _turn(x: Tensor, seq: Sequences, interleaved: bool) -> Tensor:
    """(B, T, p): in complex numbers; keeps all products of a query and a key, whatever the order of dimensions."""
    assert seq.cos is not None and seq.sin is not None
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.view_as_real(torch.complex(first, second) * torch.complex(seq.cos, seq.sin)[:, :, 0]).flatten(-2)


def plain(m: LatentAttention, x: Tensor, seq: Sequences, cfg: ModelConfig) -> Tensor:
    """Head by head, as in section 2.1 of the paper."""
    x = x.view(BATCH, LENGTH, HIDDEN)
    low = _linear(x, m.kv_down)
    latent, key_rope = _norm(low[..., :RANK], m.kv_norm), _turn(low[..., RANK:], seq, cfg.rope.interleaved)
    queries = _linear(x, m.q) if m.q is not None else _linear(_norm(_linear(x, m.q_down), m.q_norm), m.q_up)
    expanded = _linear(latent, m.kv_up)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    gone = distance < 0
    if cfg.window is not None:
        gone |= distance >= cfg.window
    documents = seq.layout.mine.documents
    if documents is not None:
        gone = gone | (documents[:, :, None] != documents[:, None, :])
    heads = []
    for h in range(HEADS):
        q = queries[..., h * (NOPE + ROPE) : (h + 1) * (NOPE + ROPE)]
        kv = expanded[..., h * (NOPE + VALUE) : (h + 1) * (NOPE + VALUE)]
        scores = q[..., :NOPE] @ kv[..., :NOPE].transpose(1, 2)
        scores = scores + _turn(q[..., NOPE:], seq, cfg.rope.interleaved) @ key_rope.transpose(1, 2)
        scores = scores * cfg.rope.score_factor / (NOPE + ROPE) ** 0.5
        heads.append(scores.masked_fill(gone, float("-inf")).softmax(-1) @ kv[..., NOPE:])
    return _linear(torch.cat(heads, -1), m.out).reshape(-1, HIDDEN)


@pytest.mark.parametrize(
    ("q_rank", "settings"),
    [
        (None, {}),
        (Q_RANK, {"qkv_bias": True, "out_bias": True}),
        (Q_RANK, {"rope": RopeConfig(interleaved=True, score_factor=1.7), "window": 6}),
    ],
    ids=["direct", "compressed", "interleaved"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_against_plain_maths(q_rank, settings, packed):
    cfg = config(q_rank, **settings)
    attention = module(cfg)
    documents = (torch.arange(LENGTH) // 7).expand(BATCH, -1) if packed else None
    x, seq = batch(cfg, documents)
    found, expected = attention(x, seq), plain(attention, x, seq, cfg)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = {"x": x, **dict(attention.named_parameters())}
    mine = torch.autograd.grad(found, list(inputs.values()), weight)
    theirs = torch.autograd.grad(expected, list(inputs.values()), weight)
    for name, a, b in zip(inputs, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=name)


def test_parameters():
    names = {name for name, _ in LatentAttention(config(Q_RANK, qkv_bias=True), 0).named_parameters()}
    assert names == {
        "q_down.weight", "q_down.bias", "q_norm.weight", "q_up.weight", "kv_down.weight", "kv_down.bias",
        "kv_norm.weight", "kv_up.weight", "out.weight",
    }  # fmt: skip
    direct = {name for name, _ in LatentAttention(config(None), 0).named_parameters()}
    assert direct == {"q.weight", "kv_down.weight", "kv_norm.weight", "kv_up.weight", "out.weight"}


@pytest.mark.parametrize("q_rank", [None, Q_RANK])
@pytest.mark.parametrize("interleaved", [False, True])
def test_deepseek_v3_of_transformers(q_rank, interleaved):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 16,
                  "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    theirs_config = DeepseekV3Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=q_rank,
        kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE, attention_bias=True,
        rope_interleave=interleaved, rope_parameters=parameters, max_position_embeddings=640,
    )  # fmt: skip
    theirs_config._attn_implementation = "eager"
    theirs = DeepseekV3Attention(theirs_config, 0).double()
    mscale = 0.1 * torch.tensor(40.0, dtype=torch.float64).log().item() + 1
    rope = RopeConfig(
        scaling="yarn", factor=40.0, original_positions=16, attention_factor=1.0, score_factor=mscale**2,
        interleaved=interleaved,
    )  # fmt: skip
    cfg = config(q_rank, rope=rope, qkv_bias=True, out_bias=True)
    mine = module(cfg)
    values = mine.state_dict()
    theirs.load_state_dict({f"{hf}.{leaf}": values[f"{own}.{leaf}"] for hf, own in NAMES.items()
                            for leaf in ("weight", "bias") if f"{own}.{leaf}" in values})  # fmt: skip
    x, seq = batch(cfg)
    assert seq.cos is not None and seq.sin is not None
    embeddings = tuple(torch.cat((t, t), -1)[:, :, 0].expand(BATCH, -1, -1) for t in (seq.cos, seq.sin))
    mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x.view(BATCH, LENGTH, HIDDEN), embeddings, mask)[0]
    # Their norms and softmax are in fp32 whatever the type.
    torch.testing.assert_close(mine(x, seq), expected.reshape(-1, HIDDEN), rtol=1e-5, atol=1e-6)
