"""What routers count, how balance follows from it, and that a layer that runs again decides nothing anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pentad.configs.schema import ModelConfig, MoeConfig, RouterConfig
from pentad.models.costs.parts import Part
from pentad.models.dropout import Draws
from pentad.models.recompute import RunLayers
from pentad.models.routing.balance import FIELDS, collect_tallies, columns, rebalance
from pentad.models.routing.router import Router
from pentad.models.sequences import Inputs
from pentad.models.transformer import RunLayer, Transformer, run_layer
from pentad.models.weights.initialise import initialise
from tests.training import TINY

BATCH, LENGTH, EXPERTS, TOP_K = 2, 16, 8, 2
run_layer_again = RunLayers(dict.fromkeys(range(8), "full"))
TOKENS = BATCH * LENGTH
GO, SKIP = torch.zeros(()), torch.ones(())


def model_config(router: dict[str, Any], layers: int = 2, **moe: Any) -> ModelConfig:
    found = MoeConfig(**{"experts": EXPERTS, "top_k": TOP_K, "ffn": 16, **moe}, router=RouterConfig(**router))
    return replace(TINY, layers=layers, moe=found)


def model_of(cfg: ModelConfig, part: Part | None = None) -> Transformer:
    model = Transformer(cfg, part)
    for param in model.parameters():
        param.data = param.data.double()
    initialise(model, cfg, seed=3)
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(TINY.vocab, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def routers(model: Transformer) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def kept(model: Transformer, name: str) -> list[list[float]]:
    """A buffer of every router."""
    return [router.get_buffer(name).tolist() for router in routers(model)]


def totals_of(model: Transformer) -> Tensor:
    totals = collect_tallies(model, torch.device("cpu"))
    assert totals is not None
    return totals


def column(totals: Tensor, name: str) -> Tensor:
    return totals[:, FIELDS.index(name)]


# Counting -----------------------------------------------------------------------------------------------------


def watch(model: Transformer, seen: dict[int, tuple[Any, Tensor]]) -> None:
    """Keeps each router's routing and logits, made outside of it."""

    def look(router: Any, args: Any, routing: Any) -> None:
        bias = 0 if router.bias is None else router.bias
        seen[router.index] = routing, args[0].detach() @ router.weight.detach().t() + bias

    for router in routers(model):
        router.register_forward_hook(look)


@pytest.mark.parametrize(
    "router", [{"aux_loss": 0.1}, {"score": "sigmoid", "null_experts": 4, "aux_loss": 0.1}], ids=["softmax", "null"]
)
def test_tally_is_what_happened(router):
    cfg = model_config(router, capacity_factor=0.7)
    model, seen, (tokens, labels) = model_of(cfg), {}, batch()
    watch(model, seen)
    share = 0.25
    model(Inputs(tokens, labels, share=share))
    totals = totals_of(model)
    assert totals.shape == (2, columns(cfg.moe)) and totals.dtype == torch.float64
    for row, layer in zip(totals, (0, 1), strict=True):
        routing, logits = seen[layer]
        scores = logits.softmax(-1) if "score" not in router else logits.sigmoid()
        shares = scores / scores.sum(-1, keepdim=True)
        loads = torch.bincount(logits.topk(TOP_K, -1).indices.flatten(), minlength=logits.shape[1]).double()
        kept, assigned = float((routing.experts >= 0).sum()), float(loads[:EXPERTS].sum())
        smooth = loads / loads.sum()
        if len(loads) > EXPERTS:
            smooth[EXPERTS:] = smooth[EXPERTS:].mean()
        expected = {
            "tokens": TOKENS,
            "assignments": assigned,
            "dropped": assigned - kept,
            "null": float(loads[EXPERTS:].sum()),
            "entropy": float(-(shares * shares.log()).sum()),
            "top1": float(shares.max(-1).values.sum()),
            "aux": share * len(loads) * float((smooth * shares.mean(0)).sum()),
            "z": share * float(logits.logsumexp(-1).square().mean()),
        }
        assert expected["dropped"] > 0
        assert dict(zip(FIELDS, row.tolist(), strict=False)) == pytest.approx(expected, rel=1e-12)
        assert row[len(FIELDS) :].tolist() == loads.tolist()
    assert not totals_of(model).any()  # collected once


def test_balancing_loss_against_transformers():
    """Theirs counts assignments per token, so it is top_k times ours."""
    cfg = model_config({"aux_loss": 0.02}, layers=1)
    model, seen, (tokens, labels) = model_of(cfg), {}, batch()
    watch(model, seen)
    model(Inputs(tokens, labels, share=1.0))
    theirs = load_balancing_loss_func((seen[0][1],), EXPERTS, TOP_K)
    assert float(column(totals_of(model), "aux")) == pytest.approx(float(theirs) / TOP_K, rel=1e-6)


@pytest.mark.parametrize("level", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balancing_loss_is_one_where_the_load_is_even(level, score):
    """Every token favours one pair of experts; each pair has as many tokens of each sequence."""
    cfg = model_config({"aux_loss": 0.5, "aux_level": level, "score": score}, layers=1)
    model = model_of(cfg)
    router = routers(model)[0]
    router.weight.data.zero_()
    pairs = torch.arange(EXPERTS)
    router.weight.data[pairs, pairs // 2] = 1.0
    x = torch.zeros(TOKENS, TINY.hidden, dtype=torch.float64)
    x[torch.arange(TOKENS), torch.arange(TOKENS) % (EXPERTS // 2)] = 3.0
    seq = model.sequences(Inputs(batch()[0], share=1.0), torch.float64)
    router(x, seq)
    assert float(column(totals_of(model), "aux")) == pytest.approx(1.0, abs=1e-12)
    uneven = x.clone()
    uneven[:10] = x[0]
    rebalance(model, _loads(cfg, [9, 9, 1, 1, 1, 1, 1, 1]), GO)
    router(uneven, seq)
    assert float(column(totals_of(model), "aux")) > 1.02


def test_global_balance_follows_the_step_before():
    """An even load before the first step; then that of the step before, whatever this one's is."""
    cfg = model_config({"aux_loss": 0.5, "aux_level": "global_batch"}, layers=1)
    model, (tokens, labels), seen = model_of(cfg), batch(), {}
    watch(model, seen)
    model(Inputs(tokens, labels, share=1.0))
    first = totals_of(model)
    assert float(column(first, "aux")) == pytest.approx(1.0, abs=1e-12)
    rebalance(model, first, GO)
    model(Inputs(tokens, labels, share=1.0))
    counts = first[0, len(FIELDS) :]
    loads = (counts / counts.sum()).float().double()
    expected = EXPERTS * float((loads * seen[0][1].softmax(-1).mean(0)).sum())
    assert float(column(totals_of(model), "aux")) == pytest.approx(expected, rel=1e-12)
    assert expected > 1.0001


def test_layers_elsewhere_are_zero():
    cfg = model_config({}, layers=5, dense_layers=1, every=2)
    assert cfg.moe_layers == (2, 4)
    part = Part((3, 4), begins=False)
    model = model_of(cfg, part)
    tokens, _ = batch()
    seq = model.sequences(Inputs(tokens, share=1.0), torch.float64)
    model.run_layers(torch.ones(TOKENS, TINY.hidden, dtype=torch.float64), seq, None, part.layers)
    totals = totals_of(model)
    assert column(totals, "tokens").tolist() == [0, TOKENS]
    assert collect_tallies(model_of(replace(cfg, moe=MoeConfig())), torch.device("cpu")) is None


# Balance without a loss ---------------------------------------------------------------------------------------


def _loads(cfg: ModelConfig, *rows: list[float]) -> Tensor:
    totals = torch.zeros(len(rows), columns(cfg.moe), dtype=torch.float64)
    totals[:, len(FIELDS) :] = torch.tensor(rows, dtype=torch.float64)
    return totals


def test_selection_bias_moves_against_the_load():
    cfg = model_config({"selection_bias": True, "bias_rate": 0.5})
    model = model_of(cfg)
    totals = _loads(cfg, [9, 1, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 16])
    rebalance(model, totals, GO)
    assert kept(model, "selection_bias") == [
        [-0.5, 0.5, 0, 0, 0, 0, 0, 0],
        [*[0.5] * 7, -0.5],
    ]
    rebalance(model, totals, GO)
    assert kept(model, "selection_bias")[0] == [-1, 1, 0, 0, 0, 0, 0, 0]
    rebalance(model, totals, SKIP)
    assert kept(model, "selection_bias")[0] == [-1, 1, 0, 0, 0, 0, 0, 0]


def test_null_experts_move_together():
    """Their mean load 4 is below the mean 5; which of them was taken means nothing."""
    cfg = model_config({"selection_bias": True, "bias_rate": 1.0, "null_experts": 2}, layers=1)
    model = model_of(cfg)
    rebalance(model, _loads(cfg, [7, 5, 4, 5, 6, 5, 5, 5, 0, 8]), GO)
    assert kept(model, "selection_bias")[0] == [-1, 0, 1, 0, -1, 0, 0, 0, 1, 1]


def test_skipped_step_leaves_the_load():
    cfg = model_config({"aux_loss": 0.1, "aux_level": "global_batch"}, layers=1)
    model = model_of(cfg)
    rebalance(model, _loads(cfg, [4, 2, 2, 2, 2, 2, 1, 1]), GO)
    expected = [0.25, 0.125, 0.125, 0.125, 0.125, 0.125, 0.0625, 0.0625]
    assert kept(model, "load")[0] == expected
    rebalance(model, _loads(cfg, [16, 0, 0, 0, 0, 0, 0, 0]), SKIP)
    assert kept(model, "load")[0] == expected


def test_selection_bias_evens_out_the_load():
    cfg = model_config({"selection_bias": True, "bias_rate": 0.02, "score": "sigmoid"}, layers=1)
    model, (tokens, labels) = model_of(cfg), batch()
    routers(model)[0].weight.data.mul_(10)
    loads = []
    for _ in range(60):
        model(Inputs(tokens, labels, share=1.0))
        totals = totals_of(model)
        loads.append(totals[0, len(FIELDS) :] / (TOKENS * TOP_K / EXPERTS))
        rebalance(model, totals, GO)
    assert loads[0].max() > 1.5
    assert torch.stack(loads[-10:]).mean(0).max() < 1.25


def test_only_what_is_used_is_saved():
    names = {"router.selection_bias", "router.load"}
    for router, expected in (
        ({}, set()),
        ({"selection_bias": True}, {"router.selection_bias"}),
        ({"selection_bias": True, "aux_loss": 0.1, "aux_level": "global_batch"}, names),
        ({"aux_level": "global_batch"}, set()),
    ):
        model = model_of(model_config(router, layers=1))
        params = {name for name, _ in model.named_parameters()}
        saved = {name.partition("moe.")[2] for name in model.state_dict() if name not in params}
        assert saved == expected


# Running again ------------------------------------------------------------------------------------------------

AGAIN = {
    "mixtral": model_config({"aux_loss": 0.5, "z_loss": 0.1, "jitter": 0.1}),
    "sequence": model_config({"score": "sigmoid", "aux_loss": 0.5, "aux_level": "sequence"}, capacity_factor=0.8),
    "null": model_config({"null_experts": 4, "aux_loss": 0.5}, capacity_factor=0.5, weigh="before"),
    "expert-choice": model_config({"name": "expert_choice"}),
    "sinkhorn": model_config({"name": "sinkhorn"}),
}


def gradients(
    cfg: ModelConfig, how: RunLayer, change: Callable[[Router], None] | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(loss, gradients, totals) of one microbatch."""
    model, (tokens, labels) = model_of(cfg), batch()
    model.run_layer = how
    for router in routers(model) if change else ():
        change(router)  # pyright: ignore[reportOptionalCall]
    draws = Draws(0.0, 1, 2, (3, 4), LENGTH, torch.arange(TOKENS))
    loss = model(Inputs(tokens, labels, scale=1 / TOKENS, draws=draws, share=0.5))
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, totals_of(model)


def assert_equal_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("cfg", AGAIN.values(), ids=AGAIN)
def test_running_again_changes_nothing(cfg):
    loss, grads, totals = gradients(cfg, run_layer_again)
    expected = gradients(cfg, run_layer)
    assert torch.equal(loss, expected[0])
    assert_equal_gradients(grads, expected[1])
    assert torch.equal(totals, expected[2])


def _other_the_second_time(router: Router) -> None:
    """The router's second decision would send every token elsewhere, as one that turned on a rounding error could."""
    decide, calls = router._chosen, []

    def chosen(*args: Any) -> Tensor:
        calls.append(None)
        return (decide(*args) + len(calls) - 1) % EXPERTS

    router._chosen = chosen  # type: ignore[method-assign]


def _forgetful(layer: Any, x: Any, seq: Any, draws: Any) -> Tensor:
    y = checkpoint(layer, x, seq, draws, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y


def test_the_second_run_keeps_the_first_ones_choices():
    """Without what is kept nothing would complain, and other experts would get the gradients."""
    cfg = AGAIN["mixtral"]
    expected = gradients(cfg, run_layer)
    loss, grads, _ = gradients(cfg, run_layer_again, _other_the_second_time)
    assert torch.equal(loss, expected[0])
    assert_equal_gradients(grads, expected[1])
    _, wrong, _ = gradients(cfg, _forgetful, _other_the_second_time)
    name = "layers.0.moe.experts.up.weight"
    assert (wrong[name] - expected[1][name]).norm() > 0.1 * expected[1][name].norm()


def test_losses_reach_everything_below():
    """Their gradient passes through the layers before, and is as large as its coefficient says."""
    plain = gradients(model_config({}), run_layer)
    small = gradients(model_config({"aux_loss": 0.1, "z_loss": 0.01}), run_layer)
    large = gradients(model_config({"aux_loss": 1.0, "z_loss": 0.1}), run_layer)
    assert torch.equal(plain[0], large[0])  # the training loss that is reported is the model's own
    for name in ("layers.1.moe.router.weight", "layers.0.attention.q.weight", "embed.weight"):
        one, ten = small[1][name] - plain[1][name], large[1][name] - plain[1][name]
        torch.testing.assert_close(ten, 10 * one, rtol=1e-9, atol=1e-12)
        assert ten.norm() > 1e-3 * plain[1][name].norm()
