"""Multi-token prediction against the loss written down by hand, and in several layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pentad.configs.schema import MoeConfig, RouterConfig
from pentad.models.mtp import Prediction, ahead
from pentad.models.sequences import Inputs
from pentad.models.transformer import Layer, Transformer
from pentad.models.weights.initialise import initialise
from tests.same_training import check
from tests.training import TINY

B, T = 2, 9


def test_what_follows_ends_at_a_gap():
    labels = torch.tensor([[1, 2, 3, 4, -1, 6, 7, 8]])
    first, second, third = ahead(labels, 2)
    assert torch.equal(first, labels)
    assert second.tolist() == [[2, 3, 4, -1, -1, 7, 8, -1]]
    assert third.tolist() == [[3, 4, -1, -1, -1, 8, -1, -1]]


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_are_those_of_the_sum_of_losses(depth):
    cfg = replace(TINY, mtp=depth, mtp_loss=0.3)
    model = Transformer(cfg).double()
    initialise(model, cfg)
    draws = torch.Generator().manual_seed(3)
    text = torch.randint(cfg.vocab, (B, T + 1), generator=draws)
    tokens, labels = text[:, :-1], text[:, 1:]
    scale = 1 / labels.numel()
    loss = model(Inputs(tokens, ahead(labels, depth), scale=scale, share=1.0))
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()

    seq = model.sequences(Inputs(tokens), torch.float64)
    hidden = model.run_layers(model.embed_tokens(Inputs(tokens)), seq, None, range(cfg.layers))
    plain = F.cross_entropy(model.end(hidden) @ model.head_weight.T, labels.reshape(-1))
    total, x = plain, hidden
    for k, module in enumerate(model.mtp, 1):
        assert isinstance(module, Prediction) and isinstance(module.layer, Layer)
        following = torch.zeros_like(tokens)
        following[:, : T + 1 - k] = text[:, k:]
        joined = torch.cat((module.hidden_norm(x), module.embed_norm(model.embed_weight[following.reshape(-1)])), -1)
        x = module.layer(joined @ module.project.weight.T, seq, None)
        logits = (module.norm(x) @ model.head_weight.T).view(B, T, -1)[:, : T - k]
        wanted = text[:, k + 1 :]
        summed = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), reduction="sum")
        total = total + 0.3 / depth * scale * summed
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    total.backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and grads[name] is not None, name
        torch.testing.assert_close(grads[name], param.grad, rtol=1e-10, atol=1e-13, msg=name)


PIPELINES = {
    "1f1b": {"pipeline": {"schedule": "1f1b", "layers": (2, 1)}},
    "split": {"pipeline": {"schedule": "gis", "chunks": 2, "layers": (1, 1, 1, 0)}},
    "one rank has both ends": {"pipeline": {"schedule": "zb-v", "chunks": 2, "layers": (1, 1, 1, 0)}},
}


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "dp": 2, "ep": 4, "recompute": "full"},
        {"cp": 2, "tp": 2, "ep": 4},
        {"pp": 2, "dp": 2, "ep": 2, **PIPELINES["1f1b"]},
        {"pp": 2, "cp": 2, "tp": 2, "ep": 2, **PIPELINES["split"]},
        {"pp": 2, "dp": 2, "recompute": "full", **PIPELINES["one rank has both ends"]},
    ],
    ids=lambda layout: "-".join(f"{key}{value}" for key, value in layout.items() if isinstance(value, int)),
)
def test_layouts(layout, tied):
    moe = MoeConfig(experts=4, top_k=2, ffn=16, router=RouterConfig(groups_kept=1, aux_loss=0.01))
    model = {"layers": 3, "mtp": 2, "tied": tied, "moe": moe}
    check(**layout, sharding="zero1", masked=True, model=model, steps=5)
