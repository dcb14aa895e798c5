"""Upcycling: a mixture of experts that computes what the dense model computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import ModelConfig, MoeConfig, RouterConfig
from pentad.models.mtp import Prediction
from pentad.models.sequences import Inputs
from pentad.models.transformer import Transformer
from pentad.models.weights.initialise import initialise
from pentad.models.weights.upcycle import check_upcycling, upcycled, upcycled_config
from pentad.parallel.global_tensor import Placement

DENSE = ModelConfig(
    layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=64, max_positions=32, init_std=0.3
)
BIASED = replace(DENSE, activation="gelu", ffn_bias=True, norm="layer")
TOKENS = torch.arange(48).reshape(2, 24) * 7 % 64


def random_model(cfg: ModelConfig) -> Transformer:
    """fp64, its vectors random too."""
    model = Transformer(cfg).double().eval()
    initialise(model, cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def weights(dense: Transformer, cfg: ModelConfig, granularity: int) -> dict[str, torch.Tensor]:
    """All parameters of the model with experts."""
    stored = {name: parameter.detach() for name, parameter in dense.named_parameters()}

    def read(name: str, placement: Placement) -> torch.Tensor:
        assert placement.global_shape == tuple(stored[name].shape)
        return placement.of(stored[name])

    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(cfg).named_parameters()}
    return {
        name: upcycled(name, Placement.whole(shape), cfg, granularity, read, seed=3) for name, shape in shapes.items()
    }


@torch.no_grad()
def difference(dense_cfg: ModelConfig, cfg: ModelConfig) -> float:
    """Largest difference of a logit, over the largest logit."""
    granularity = check_upcycling(dense_cfg, cfg)
    dense, made = random_model(dense_cfg), Transformer(cfg).double().eval()
    for name, value in weights(dense, cfg, granularity).items():
        made.get_parameter(name).copy_(value)
    expected = dense(TOKENS)
    return float((made(TOKENS) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dense", [DENSE, BIASED], ids=["swiglu", "gelu-biased"])
@pytest.mark.parametrize(
    ("experts", "top_k", "granularity"), [(4, 2, 1), (8, 4, 2), (8, 2, 2), (16, 8, 8), (32, 16, 8)]
)
def test_the_same_function(dense: ModelConfig, experts: int, top_k: int, granularity: int) -> None:
    cfg = upcycled_config(dense, experts=experts, top_k=top_k, granularity=granularity)
    assert cfg.moe.ffn == dense.ffn // granularity
    assert difference(dense, cfg) < 1e-12


FORMS: dict[str, dict[str, Any]] = {
    "odd granularity": {"experts": 6, "top_k": 3, "ffn": 16},
    "sigmoid": {"experts": 8, "top_k": 4, "ffn": 24, "router": RouterConfig(score="sigmoid", selection_bias=True)},
    "scale": {"experts": 8, "top_k": 4, "ffn": 24, "router": RouterConfig(scale=2.5)},
    "groups": {"experts": 8, "top_k": 2, "ffn": 24, "router": RouterConfig(groups=4, groups_kept=2)},
    "logit bias": {"experts": 8, "top_k": 4, "ffn": 24, "router": RouterConfig(logit_bias=True)},
    "shared": {"experts": 8, "top_k": 4, "ffn": 16, "shared": 16},
    "shared, gated": {"experts": 8, "top_k": 4, "ffn": 16, "shared": 16, "shared_gate": True},
    "some layers": {"experts": 8, "top_k": 4, "ffn": 24, "dense_layers": 1, "every": 2},
}


@pytest.mark.parametrize("dense", [DENSE, BIASED], ids=["swiglu", "gelu-biased"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_function_in_every_form(dense: ModelConfig, form: str) -> None:
    cfg = replace(dense, moe=MoeConfig(**FORMS[form], bias=dense.ffn_bias))
    assert difference(dense, cfg) < 1e-12


@torch.no_grad()
def test_the_layers_of_prediction_modules_start_as_the_dense_ones() -> None:
    dense_cfg = replace(DENSE, mtp=2)
    cfg = upcycled_config(dense_cfg, experts=8, top_k=4, granularity=2)
    dense, made = random_model(dense_cfg), Transformer(cfg).double().eval()
    for name, value in weights(dense, cfg, 2).items():
        made.get_parameter(name).copy_(value)
    x = torch.randn(TOKENS.numel(), DENSE.hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seq = dense.sequences(Inputs(TOKENS), torch.float64)
    for one, other in zip(dense.mtp, made.mtp, strict=True):
        assert isinstance(one, Prediction) and isinstance(other, Prediction)
        assert any(".experts." in name for name, _ in other.layer.named_parameters())
        expected = one.layer(x, seq, None)
        assert (other.layer(x, seq, None) - expected).abs().max() / expected.abs().max() < 1e-12


def test_the_factor_belongs_to_the_last_matrix_alone() -> None:
    """Spread over the three matrices as a cube root, which gated activations do not allow, it is percents off."""
    cfg = upcycled_config(DENSE, experts=16, top_k=8, granularity=8)
    dense, made = random_model(DENSE), Transformer(cfg).double().eval()
    with torch.no_grad():
        for name, value in weights(dense, cfg, 8).items():
            factor = {"gate": 2.0, "up": 2.0, "down": 0.25}.get(name.split(".")[-2], 1.0) if "experts" in name else 1.0
            made.get_parameter(name).copy_(value * factor)
        assert (made(TOKENS) - dense(TOKENS)).abs().max() / dense(TOKENS).abs().max() > 0.01


@pytest.mark.parametrize("form", ["shared, gated", "odd granularity", "some layers"])
def test_slices_are_those_of_the_whole(form: str) -> None:
    """Cut over experts and inner width, as expert parallelism does."""
    cfg = replace(BIASED, moe=MoeConfig(**FORMS[form], bias=True))
    dense, granularity = random_model(BIASED), check_upcycling(BIASED, cfg)
    whole = weights(dense, cfg, granularity)
    stored = {name: parameter.detach() for name, parameter in dense.named_parameters()}
    read: list[int] = []

    def part(name: str, placement: Placement) -> torch.Tensor:
        value = placement.of(stored[name])
        read.append(value.numel())
        return value

    cut = 0
    for name, value in whole.items():
        for dim in range(value.dim()):
            if value.shape[dim] % 2 == 0:
                placement = Placement.whole(tuple(value.shape)).cut(dim, 1, 2)
                read.clear()
                assert torch.equal(upcycled(name, placement, cfg, granularity, part, seed=3), placement.of(value)), name
                assert sum(read) <= value.numel() // 2  # no more than the slice
                cut += 1
    assert cut > 40


def test_rows_of_the_router() -> None:
    """Those of one dense network's experts are alike, those of two differ, and they depend on the layer."""
    cfg = upcycled_config(DENSE, experts=8, top_k=4, granularity=2)
    made = weights(random_model(DENSE), cfg, 2)
    rows = made["layers.0.moe.router.weight"]
    assert torch.equal(rows[0::2], rows[1::2])
    assert len(torch.unique(rows, dim=0)) == 4
    assert not torch.equal(rows, made["layers.1.moe.router.weight"])


def test_the_family_is_one_that_can_be_exported() -> None:
    made = upcycled_config(replace(DENSE, family="llama"), experts=4, top_k=2)
    assert made.family == "mixtral"
    assert upcycled_config(replace(DENSE, family="qwen3", qk_norm=True), experts=4, top_k=2).family == "qwen3_moe"
    assert upcycled_config(replace(BIASED, family="gpt2"), experts=4, top_k=2).family == "gpt2"


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"experts": 8, "top_k": 3, "ffn": 24}, r"model\.moe\.top_k: 3 is not a multiple of the granularity 2"),
        ({"experts": 9, "top_k": 2, "ffn": 24}, r"model\.moe\.experts: 9 is not a multiple of the granularity 2"),
        ({"experts": 8, "top_k": 2, "ffn": 20}, r"model\.moe\.ffn: 20 does not divide the dense network's width 48"),
        ({"experts": 8, "top_k": 2, "ffn": 24, "shared": 16}, r"ffn: 24 does not divide .* 48 less the shared .* 16"),
        ({"router": RouterConfig(normalize=False)}, r"model\.moe\.router\.normalize: false"),
        ({"router": RouterConfig(null_experts=2)}, r"model\.moe\.router\.null_experts: 2"),
        ({"router": RouterConfig(name="expert_choice")}, r"model\.moe\.router\.name: expert_choice"),
        ({"router": RouterConfig(groups=8, groups_kept=4)}, r"8 groups of 1 experts cut through the 2 experts of one"),
    ],
)
def test_what_would_not_start_as_the_dense_model(moe: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"experts": 8, "top_k": 4, "ffn": 24} | moe
    with pytest.raises(UserError, match=message):
        check_upcycling(DENSE, replace(DENSE, moe=MoeConfig(**settings)))


def test_other_mistakes() -> None:
    cfg = replace(BIASED, moe=MoeConfig(experts=4, ffn=48))
    with pytest.raises(UserError, match=r"model\.moe\.bias: false, but the dense networks have biases"):
        check_upcycling(BIASED, cfg)
    with pytest.raises(UserError, match="the model has 4 experts already"):
        check_upcycling(cfg, cfg)
    with pytest.raises(UserError, match=r"--upcycle granularity: 5 does not divide the .* width 48"):
        upcycled_config(DENSE, experts=10, top_k=5, granularity=5)
    with pytest.raises(UserError, match=r"--upcycle top_k: 3 is not a multiple"):
        upcycled_config(DENSE, experts=8, top_k=3, granularity=2)
