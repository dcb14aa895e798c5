"""Routers against plain loops over tokens, against transformers' routers, and their gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

from pentad.configs.schema import MoeConfig, RouterConfig
from pentad.models.dropout import Draws
from pentad.models.routing.choice import capacity, coarse, sinkhorn_prices, within_capacity
from pentad.models.routing.router import Router
from pentad.models.sequences import Sequences
from pentad.parallel.expert.routing import Routing
from pentad.parallel.kernels.mask import TokenIndex, TokenLayout
from tests.training import TINY

HIDDEN, BATCH, LENGTH, EXPERTS = TINY.hidden, 3, 8, 8
TOKENS = BATCH * LENGTH


def moe_config(router: dict[str, Any], **moe: Any) -> MoeConfig:
    return MoeConfig(**{"experts": EXPERTS, "top_k": 3, **moe}, router=RouterConfig(**router))


def router_of(cfg: MoeConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Router:
    draws = torch.Generator().manual_seed(seed)
    router = Router(replace(TINY, moe=cfg), index=2).to(dtype)
    for param in router.parameters():
        param.data = torch.randn(param.shape, generator=draws, dtype=torch.float64).mul(0.3).to(dtype)
    if router.selection_bias is not None:
        router.selection_bias = torch.linspace(0.2, -0.2, len(router.weight))
    return router


def inputs(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sequences(share: float = 0.0, kept: dict | None = None) -> Sequences:
    places, layout = torch.arange(TOKENS), TokenLayout((TokenIndex.whole(LENGTH),))
    return Sequences(BATCH, LENGTH, None, None, layout, places // LENGTH, share, kept, places)


def chosen(routing: Routing) -> list[dict[int, float]]:
    """Expert → weight, token by token."""
    return [
        {int(e): float(w) for e, w in zip(ids, weights, strict=True) if e >= 0}
        for ids, weights in zip(routing.experts, routing.weights.detach(), strict=True)
    ]


def assert_same(mine: list[dict[int, float]], theirs: list[dict[int, float]], tolerance: float = 1e-13) -> None:
    assert [set(token) for token in mine] == [set(token) for token in theirs]
    for token, expected in zip(mine, theirs, strict=True):
        assert token == pytest.approx(expected, rel=tolerance, abs=tolerance)


# The plain loops ----------------------------------------------------------------------------------------------


def plain(router: Router, x: Tensor) -> list[dict[int, float]]:
    """What a token's experts and weights should be, one token after the other, in Python's own numbers."""
    cfg, moe, weight = router.cfg, router.moe, router.weight.tolist()
    bias = router.bias.tolist() if router.bias is not None else [0.0] * len(weight)
    rows = [
        [b + math.fsum(a * w for a, w in zip(token, row, strict=True)) for row, b in zip(weight, bias, strict=True)]
        for token in x.tolist()
    ]
    scores = [_scores(logits, cfg.score) for logits in rows]
    if cfg.name == "expert_choice":
        return _plain_expert_choice(scores, moe)
    prices = _plain_prices(rows) if cfg.name == "sinkhorn" else None
    found = []
    for logits, token in zip(rows, scores, strict=True):
        by = list(token)
        if router.selection_bias is not None:
            by = [s + b for s, b in zip(by, router.selection_bias.tolist(), strict=True)]
        if prices is not None:
            by = [value + price for value, price in zip(logits, prices, strict=True)]
        best = sorted(_allowed(by, moe), key=lambda e: -by[e])[: moe.top_k]
        real = [e for e in best if e < moe.experts]
        if cfg.name == "sinkhorn" and moe.top_k == 1:
            weights = {e: 1 / (1 + math.exp(-logits[e])) for e in real}
        else:
            total = math.fsum(token[e] for e in real) if cfg.normalize else 1.0
            weights = {e: token[e] / total * cfg.scale for e in real}
        found.append(weights)
    return found if moe.capacity_factor is None else _plain_drop(found, moe)


def _scores(logits: list[float], score: str) -> list[float]:
    if score == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in logits]
    top = max(logits)
    total = math.fsum(math.exp(value - top) for value in logits)
    return [math.exp(value - top) / total for value in logits]


def _allowed(by: list[float], moe: MoeConfig) -> list[int]:
    cfg, size = moe.router, moe.experts // moe.router.groups
    groups = [range(g * size, (g + 1) * size) for g in range(cfg.groups)]
    best = sorted(groups, key=lambda group: -sum(sorted((by[e] for e in group), reverse=True)[: cfg.group_members]))
    return [*(e for group in best[: cfg.groups_kept] for e in group), *range(moe.experts, len(by))]


def _plain_prices(rows: list[list[float]]) -> list[float]:
    """Sinkhorn and Knopp's iteration on the matrix of exponentials, far past where the router stops."""
    matrix = torch.tensor(rows, dtype=torch.float64).exp()
    tokens, choices = matrix.shape
    columns = torch.ones(choices, dtype=torch.float64)
    for _ in range(1000):
        scaled = 1 / tokens / (matrix @ columns)
        columns = 1 / choices / (scaled @ matrix)
    return columns.log().tolist()


def _plain_expert_choice(scores: list[list[float]], moe: MoeConfig) -> list[dict[int, float]]:
    room = math.ceil(len(scores) * moe.top_k / moe.experts * (moe.capacity_factor or 1))
    found: list[dict[int, float]] = [{} for _ in scores]
    for e in range(moe.experts):
        for t in sorted(range(len(scores)), key=lambda t: -scores[t][e])[:room]:
            found[t][e] = scores[t][e] * moe.router.scale
    return found


def _plain_drop(found: list[dict[int, float]], moe: MoeConfig) -> list[dict[int, float]]:
    assert moe.capacity_factor is not None
    room = math.ceil(len(found) * moe.top_k / moe.experts * moe.capacity_factor)
    kept: list[dict[int, float]] = [{} for _ in found]
    for e in range(moe.experts):
        takers = [t for t, token in enumerate(found) if e in token]
        if moe.drop == "probability":
            takers.sort(key=lambda t: -found[t][e])
        for t in takers[:room]:
            kept[t][e] = found[t][e]
    return kept


CONFIGS = {
    "mixtral": moe_config({}),
    "switch": moe_config({"normalize": False}, top_k=1),
    "normalized-top-1": moe_config({}, top_k=1),
    "bias": moe_config({"logit_bias": True}),
    "sigmoid": moe_config({"score": "sigmoid", "scale": 2.5}),
    "sigmoid-plain": moe_config({"score": "sigmoid", "normalize": False}),
    "selection-bias": moe_config({"score": "sigmoid", "selection_bias": True}),
    "softmax-selection-bias": moe_config({"selection_bias": True}),
    "groups": moe_config({"groups": 4, "groups_kept": 2, "group_members": 1, "normalize": False, "scale": 16.0}),
    "deepseek-v3": moe_config({"score": "sigmoid", "selection_bias": True, "groups": 4, "groups_kept": 2}),
    "null": moe_config({"null_experts": 5}),
    "null-plain": moe_config({"null_experts": 5, "normalize": False}),
    "null-sigmoid": moe_config({"null_experts": 5, "score": "sigmoid", "selection_bias": True}),
    "null-groups": moe_config({"null_experts": 3, "groups": 2, "groups_kept": 1}),
    "expert-choice": moe_config({"name": "expert_choice"}),
    "expert-choice-2": moe_config({"name": "expert_choice", "scale": 2.0}, capacity_factor=1.7),
    "sinkhorn": moe_config({"name": "sinkhorn"}),
    "sinkhorn-top-1": moe_config({"name": "sinkhorn"}, top_k=1),
    "sinkhorn-plain": moe_config({"name": "sinkhorn", "normalize": False}),
    "drop": moe_config({}, capacity_factor=0.7),
    "drop-first": moe_config({}, capacity_factor=0.7, drop="position"),
    "drop-local": moe_config({"normalize": False}, capacity_factor=0.5, capacity_scope="local"),
    "drop-null": moe_config({"null_experts": 5, "score": "sigmoid"}, capacity_factor=0.3),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_plain_loop(cfg):
    router, x = router_of(cfg), inputs()
    expected = plain(router, x)
    assert_same(chosen(router(x, sequences(0.5))), expected)
    if cfg.router.name != "sinkhorn":
        assert_same(chosen(router(x, sequences())), expected)
    if cfg.router.null_experts:
        assert min(len(token) for token in expected) < max(len(token) for token in expected)


@pytest.mark.parametrize("name", ["drop", "drop-first", "drop-local", "drop-null"])
def test_full_experts_drop_tokens(name):
    router, x = router_of(CONFIGS[name]), inputs()
    found = router(x, sequences()).experts
    limit = capacity(router.moe, TOKENS)
    assert torch.bincount(found[found >= 0], minlength=EXPERTS).max() == limit
    unlimited = router_of(replace(CONFIGS[name], capacity_factor=None))(x, sequences()).experts
    assert torch.bincount(unlimited[unlimited >= 0], minlength=EXPERTS).max() > limit


def test_padding_asks_for_the_capacity():
    cfg = moe_config({}, capacity_factor=1.25, capacity_scope="local", pad=True)
    assert router_of(cfg)(inputs(), sequences()).capacity == math.ceil(TOKENS * 3 / EXPERTS * 1.25)


def test_capacity_is_exact():
    """1.1 · 100 is 110, not 111; an expert cannot take more tokens than there are."""
    for tokens, top_k, factor, expected in ((800, 1, 1.1, 110), (24, 3, 1.0, 9), (24, 3, 1.01, 10), (8, 8, 4.0, 8)):
        assert capacity(moe_config({}, top_k=top_k, capacity_factor=factor), tokens) == expected


def test_sinkhorn_shares_the_tokens_evenly():
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(8) / 2
    balanced = torch.softmax(logits + sinkhorn_prices(logits), -1)
    torch.testing.assert_close(balanced.mean(0), torch.full((8,), 1 / 8, dtype=torch.float64), rtol=1e-3, atol=0)
    assert torch.softmax(logits, -1).mean(0).max() > 0.3


def test_sinkhorn_evaluates_like_top_k():
    cfg = CONFIGS["sinkhorn"]
    router, other = router_of(cfg), router_of(replace(cfg, router=RouterConfig()))
    quiet = router(inputs(), sequences())
    assert_same(chosen(quiet), chosen(other(inputs(), sequences())))
    assert not torch.equal(router(inputs(), sequences(share=1.0)).experts, quiet.experts)


def test_equal_tokens_are_kept_in_order():
    """Rounding decides nothing: tokens that differ in the last bits only count as equal."""
    noise = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype, width in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        weights = (0.7 * (1 + width * noise)).to(dtype)
        room = within_capacity(torch.zeros(40, 1, dtype=torch.long), weights, 10, 1)
        assert room.flatten().tolist() == [True] * 10 + [False] * 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coarse_keeps_the_order(dtype):
    x = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=dtype).square()
    ordered = x[coarse(x).argsort(stable=True)]
    assert (ordered.diff() >= -(2**-11) * ordered[1:]).all()


def test_scores_are_fp32_of_bf16_operands():
    cfg = moe_config({"logit_bias": True, "score": "sigmoid", "scale": 2.5})
    router, x = router_of(cfg, torch.bfloat16), inputs(torch.bfloat16)
    precise = router_of(cfg)
    precise.load_state_dict({name: value.double() for name, value in router.state_dict().items()})
    routing = router(x, sequences())
    assert routing.weights.dtype == torch.float32
    expected = precise(x.double(), sequences())
    assert_same(chosen(routing), chosen(expected), 1e-5)
    for found in (routing, expected):
        found.weights[:, 0].square().sum().backward()
    for mine, theirs in zip(router.parameters(), precise.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-2, atol=1e-4)


# transformers -------------------------------------------------------------------------------------------------


def _theirs(name: str) -> tuple[Any, MoeConfig]:
    k, e = 3, EXPERTS
    match name:
        case "mixtral":
            config = MixtralConfig(num_experts_per_tok=k, num_local_experts=e, hidden_size=HIDDEN)
            return MixtralTopKRouter(config), moe_config({})
        case "qwen3_moe":
            config = Qwen3MoeConfig(num_experts_per_tok=k, num_experts=e, hidden_size=HIDDEN, norm_topk_prob=True)
            return Qwen3MoeTopKRouter(config), moe_config({})
        case "olmoe":
            config = OlmoeConfig(num_experts_per_tok=k, num_experts=e, hidden_size=HIDDEN, norm_topk_prob=False)
            return OlmoeTopKRouter(config), moe_config({"normalize": False})
        case "gpt_oss":
            config = GptOssConfig(num_experts_per_tok=k, num_local_experts=e, hidden_size=HIDDEN)
            return GptOssTopKRouter(config), moe_config({"logit_bias": True})
        case _:
            config = DeepseekV3Config(
                num_experts_per_tok=k, n_routed_experts=e, hidden_size=HIDDEN, n_group=4, topk_group=2,
                norm_topk_prob=True, routed_scaling_factor=2.5,
            )  # fmt: skip
            router = {"score": "sigmoid", "scale": 2.5, "groups": 4, "groups_kept": 2, "selection_bias": True}
            return DeepseekV3TopkRouter(config), moe_config(router)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
def test_transformers(name):
    theirs, cfg = _theirs(name)
    mine = router_of(cfg, torch.float32)
    theirs.weight.data.copy_(mine.weight.data)
    if mine.bias is not None:
        theirs.bias.data.copy_(mine.bias.data)
    if mine.selection_bias is not None:
        theirs.e_score_correction_bias.copy_(mine.selection_bias)
    x = inputs(torch.float32)
    _, weights, experts = theirs(x)
    assert_same(chosen(mine(x, sequences())), chosen(Routing(experts, weights)), 1e-5)


# Gradients and losses -----------------------------------------------------------------------------------------

LOSSES = {"aux_loss": 0.7, "z_loss": 0.3}


def total_loss(router: Router, x: Tensor, factors: Tensor, share: float) -> Tensor:
    """A main loss of the weights plus this layer's losses, written out with autograd's own operations."""
    moe, cfg = router.moe, router.cfg
    routing = router(x, sequences())
    logits = x @ router.weight.t() + (0 if router.bias is None else router.bias)
    scores = torch.softmax(logits, -1) if cfg.score == "softmax" else torch.sigmoid(logits)
    shares = scores / scores.sum(-1, keepdim=True)
    best = scores.topk(moe.top_k, -1).indices
    total = (routing.weights * factors).sum() + share * cfg.z_loss * torch.logsumexp(logits, -1).square().mean()
    sets = [slice(0, TOKENS)] if cfg.aux_level == "micro_batch" else [slice(i, i + 8) for i in range(0, TOKENS, 8)]
    for tokens in sets:
        loads = torch.bincount(best[tokens].flatten(), minlength=len(router.weight)).double() / best[tokens].numel()
        if cfg.aux_level == "global_batch":
            assert router.load is not None
            loads = router.load.double()
        if cfg.null_experts:
            loads[moe.experts :] = loads[moe.experts :].mean()
        balance = len(loads) * (loads * shares[tokens].mean(0)).sum()
        total = total + share * cfg.aux_loss * balance / len(sets)
    return total


GRADIENTS = {
    "softmax": {},
    "pre": {"normalize": False, "scale": 3.0, "logit_bias": True},
    "sigmoid": {"score": "sigmoid", "selection_bias": True, "groups": 4, "groups_kept": 2},
    "sequence": {"aux_level": "sequence"},
    "sigmoid-sequence": {"aux_level": "sequence", "score": "sigmoid", "scale": 2.5},
    "global": {"aux_level": "global_batch"},
    "null": {"null_experts": 4},
}


@pytest.mark.parametrize("settings", GRADIENTS.values(), ids=GRADIENTS)
def test_gradient_is_that_of_the_whole_loss(settings):
    """The attached losses' gradient, against autograd of the written-out loss and against finite differences of it."""
    router = router_of(moe_config(settings | LOSSES))
    if router.load is not None:
        router.load = torch.linspace(0.05, 0.2, EXPERTS)
    x, share = inputs().requires_grad_(), 0.25
    routing = router(x, sequences(share))
    factors = torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    params = [x, *router.parameters()]
    mine = torch.autograd.grad((routing.weights * factors).sum(), params)
    theirs = torch.autograd.grad(total_loss(router, x, factors, share), params)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    without = torch.autograd.grad((router(x, sequences()).weights * factors).sum(), params)
    assert (mine[1] - without[1]).norm() > 1e-3 * mine[1].norm()
    _compare_with_differences(router, x, factors, share, mine[1])


def _compare_with_differences(router: Router, x: Tensor, factors: Tensor, share: float, grad: Tensor) -> None:
    step = 1e-6
    with torch.no_grad():
        for expert, column in ((0, 3), (4, 17), (7, 30)):
            ends = []
            for move in (step, -step):
                router.weight[expert, column] += move
                ends.append(float(total_loss(router, x, factors, share)))
                router.weight[expert, column] -= move
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(grad[expert, column]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["expert-choice", "sinkhorn", "drop", "drop-null"])
def test_gradient_of_the_weights(name):
    """With what was chosen given, the weights are a smooth function of everything."""
    router = router_of(CONFIGS[name])
    x, kept = inputs().requires_grad_(), {}
    router(x, sequences(1.0, kept))

    def weights(x: Tensor, weight: Tensor) -> Tensor:
        found = torch.func.functional_call(router, {"weight": weight}, (x, sequences(1.0, kept)))
        return found.weights

    assert torch.autograd.gradcheck(weights, (x, router.weight), fast_mode=True)


def test_evaluation_counts_nothing_and_adds_no_noise():
    router = router_of(moe_config(LOSSES | {"jitter": 0.3}))
    x, draws = inputs(), Draws(0.0, 1, 2, (3, 4, 5), LENGTH, torch.arange(TOKENS))
    quiet = router(x, sequences(), draws)
    assert torch.equal(quiet.weights, router(x, sequences(), None).weights) and not router.tally.any()
    assert not torch.equal(quiet.weights, router(x, sequences(0.5), draws).weights)
    assert router.tally.any()


def test_jitter_is_keyed():
    """Its width, and that it depends on seed, step, sample and layer only."""
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.float64)
    draws = Draws(0.0, 1, 2, (3, 4, 5), LENGTH, torch.arange(TOKENS))
    whole = draws.jitter(x, 0.1, 2)
    assert 0.9 <= whole.min() < 0.902 and 1.098 < whole.max() <= 1.1
    part = replace(draws, rows=torch.arange(6, 18))
    assert torch.equal(part.jitter(x[6:18], 0.1, 2), whole[6:18])
    assert torch.equal(replace(draws, samples=(5, 3, 4)).jitter(x, 0.1, 2)[:LENGTH], whole[2 * LENGTH :])
    assert not torch.equal(draws.jitter(x, 0.1, 3), whole)
    assert not torch.equal(replace(draws, step=3).jitter(x, 0.1, 2), whole)
    assert draws.drop(x, 0) is x
