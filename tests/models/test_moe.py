"""The mixture-of-experts layer on one device, against transformers' blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pentad.configs.schema import ModelConfig
from pentad.configs.schema_model import MoeConfig, RouterConfig
from pentad.models.moe import Experts, Moe
from pentad.models.sequences import Sequences
from pentad.parallel.grouped_projection import Groups
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout

BATCH, LENGTH, HIDDEN, INNER, EXPERTS = 2, 20, 32, 48, 8
CONFIG = ModelConfig(
    layers=1, hidden=HIDDEN, heads=4, ffn=INNER, vocab=97, moe=MoeConfig(experts=EXPERTS, top_k=3, ffn=INNER)
)


def _with(cfg: ModelConfig = CONFIG, **moe: Any) -> ModelConfig:
    return replace(cfg, moe=replace(cfg.moe, **moe))


def _fill(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.2)


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Sequences]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(BATCH * LENGTH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    rows = torch.arange(BATCH).repeat_interleave(LENGTH)
    return (
        x.requires_grad_(),
        dy,
        Sequences(BATCH, LENGTH, None, None, TokenLayout((TokenIndex.whole(LENGTH),)), rows),
    )


def _run(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients by name."""
    moe = Moe(cfg, 0).to(dtype)
    _fill(moe)
    x, dy, seq = _batch(dtype)
    y = moe(x, seq)
    y.backward(dy)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    for name, param in moe.named_parameters():
        assert param.grad is not None, name
        found[name] = param.grad
    return found


def _close(ours: Tensor, theirs: Tensor | None) -> None:
    assert theirs is not None and theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def _same_as(block: nn.Module, cfg: ModelConfig, shared: bool = False) -> None:
    """Output and every gradient of transformers' block with fused gate and up, given our weights."""
    moe = Moe(cfg, 0)
    _fill(moe)
    theirs: Any = block
    copies = [
        (theirs.gate.weight, moe.router.weight),
        (theirs.experts.down_proj, moe.experts.down.weight),
    ]
    if shared:
        assert moe.shared is not None and moe.shared.gate is not None and moe.shared_gate is not None
        expert = theirs.shared_expert
        copies += [
            (expert.gate_proj.weight, moe.shared.gate.weight),
            (expert.up_proj.weight, moe.shared.up.weight),
            (expert.down_proj.weight, moe.shared.down.weight),
            (theirs.shared_expert_gate.weight, moe.shared_gate.weight),
        ]
    assert moe.experts.gate is not None
    with torch.no_grad():
        for their, our in copies:
            their.copy_(our)
        theirs.experts.gate_up_proj.copy_(torch.cat([moe.experts.gate.weight, moe.experts.up.weight], 1))

    x, dy, seq = _batch()
    y = moe(x, seq)
    y.backward(dy)
    twin = x.detach().clone().requires_grad_()
    expected = block(twin.view(BATCH, LENGTH, HIDDEN)).view(-1, HIDDEN)
    expected.backward(dy)
    assert x.grad is not None
    _close(y, expected)
    _close(x.grad, twin.grad)
    for their, our in copies:
        assert our.grad is not None
        _close(our.grad, their.grad)
    assert moe.experts.gate is not None
    parts = [part.weight.grad for part in (moe.experts.gate, moe.experts.up)]
    fused = torch.cat([part for part in parts if part is not None], 1)
    _close(fused, theirs.experts.gate_up_proj.grad)


@pytest.mark.parametrize("weigh", ["before", "after"])
@pytest.mark.parametrize("compute", ["auto", "loop", "grouped_mm"])
def test_equals_transformers_mixtral(weigh: str, compute: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = dict(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=3)
    block = MixtralSparseMoeBlock(transformers.MixtralConfig(**sizes, experts_implementation="eager"))
    _same_as(block, _with(weigh=weigh, compute=compute))


@pytest.mark.parametrize("weigh", ["before", "after"])
def test_equals_transformers_qwen2_moe(weigh: str) -> None:
    """A shared expert with a gate; weights that do not add up to 1."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    cfg = transformers.Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=40,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        experts_implementation="eager",
    )
    router = RouterConfig(normalize=False)
    _same_as(Qwen2MoeSparseMoeBlock(cfg), _with(shared=40, shared_gate=True, router=router, weigh=weigh), shared=True)


@pytest.mark.parametrize("weigh", ["before", "after"])
def test_equals_transformers_gpt_oss(weigh: str) -> None:
    """Biases on everything and the clipped activation; matrices are transposed there, gate and up interleaved."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

    cfg = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=3
    )
    cfg._experts_implementation = "eager"
    router, experts = GptOssTopKRouter(cfg), GptOssExperts(cfg)
    clipped = replace(CONFIG, activation="swiglu_clipped")
    moe = Moe(_with(clipped, bias=True, weigh=weigh, router=RouterConfig(logit_bias=True)), 0)
    _fill(moe)
    ours = moe.experts
    assert ours.gate is not None and ours.gate.bias is not None and ours.up.bias is not None
    assert ours.down.bias is not None and moe.router.bias is not None
    with torch.no_grad():
        router.weight.copy_(moe.router.weight)
        router.bias.copy_(moe.router.bias)
        experts.gate_up_proj[..., ::2].copy_(ours.gate.weight.mT)
        experts.gate_up_proj[..., 1::2].copy_(ours.up.weight.mT)
        experts.gate_up_proj_bias[..., ::2].copy_(ours.gate.bias)
        experts.gate_up_proj_bias[..., 1::2].copy_(ours.up.bias)
        experts.down_proj.copy_(ours.down.weight.mT)
        experts.down_proj_bias.copy_(ours.down.bias)

    x, dy, seq = _batch()
    x = (x.detach() * 6).requires_grad_()  # some inputs of the activation are beyond the clip
    y = moe(x, seq)
    y.backward(dy)
    twin = x.detach().clone().requires_grad_()
    _, weights, ids = router(twin)
    expected = experts(twin, ids, weights)
    expected.backward(dy)
    pairs: list[tuple[Tensor | None, Tensor | None]] = [
        (y, expected),
        (x.grad, twin.grad),
        (moe.router.weight.grad, router.weight.grad),
        (moe.router.bias.grad, router.bias.grad),
        (ours.down.bias.grad, experts.down_proj_bias.grad),
    ]
    assert experts.gate_up_proj.grad is not None and experts.gate_up_proj_bias.grad is not None
    assert experts.down_proj.grad is not None
    pairs += [
        (ours.gate.weight.grad, experts.gate_up_proj.grad[..., ::2].mT),
        (ours.up.bias.grad, experts.gate_up_proj_bias.grad[..., 1::2]),
        (ours.down.weight.grad, experts.down_proj.grad.mT),
    ]
    for our, their in pairs:
        assert our is not None
        _close(our, their)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clipped", "gelu", "gelu_tanh"])
def test_weighing_before_equals_weighing_after(activation: str, bias: bool) -> None:
    cfg = _with(replace(CONFIG, activation=activation), bias=bias)
    before, after = _run(_with(cfg, weigh="before"), torch.float64), _run(_with(cfg, weigh="after"), torch.float64)
    for name, found in after.items():
        assert (before[name] - found).norm() <= 1e-12 * found.norm(), name


@pytest.mark.parametrize("weighted", [False, True])
def test_experts_keep_the_rows_and_what_the_activation_reads(weighted: bool) -> None:
    counts = (9, 0, 30, 1, 0, 0, 7, 3)
    experts = Experts(CONFIG)
    _fill(experts)
    rows = torch.randn(sum(counts), HIDDEN, requires_grad=True)
    weights = torch.rand(sum(counts), requires_grad=True) if weighted else None
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        experts(rows, Groups(counts), weights)
    shapes = sorted(tuple(t.shape) for t in kept.values())
    wide, narrow = (sum(counts), INNER), (sum(counts), HIDDEN)
    assert shapes == ([(sum(counts),)] if weighted else []) + [narrow, wide, wide]
