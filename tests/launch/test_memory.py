"""The estimate of `pentad check` against real models: parameters exactly, activations by what autograd really keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pentad.configs import Config, load
from pentad.launch.memory import GIB, activation_elements, estimate, local_parameters
from pentad.models.transformer import Transformer

_SMALL = ["model.layers=3", "model.hidden=64", "model.heads=4", "model.ffn=160", "model.vocab=512", "train.seq_len=128"]
_LAYOUT = ["parallel.tp=1", "parallel.dp=2", "train.micro_batch=2", "train.global_batch=8", "train.dtype=fp32"]


def _job(*overrides: str) -> Config:
    return load("demo", [*_SMALL, *_LAYOUT, *overrides])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_parameters_of_one_rank_are_the_models(family: str) -> None:
    cfg = _job(f"model.family={family}", "model.kv_heads=4")
    with torch.device("meta"):
        model = Transformer(cfg.model)
    assert local_parameters(cfg.model, 1).total == sum(p.numel() for p in model.parameters())


def test_tensor_parallel_ranks_share_matrices_and_copy_norms_and_scarce_key_heads() -> None:
    cfg = _job("model.kv_heads=2", "model.tied=true", "model.family=llama")
    h, kv, ffn, vocab = 64, 2 * 16, 160, 512
    four = local_parameters(cfg.model, 4)
    # Four ranks and two key heads of width 16: every rank holds one.
    assert four.layer == 2 * h * h // 4 + 2 * h * 16 + 3 * h * ffn // 4 + 2 * h
    assert four.rest == vocab * h // 4 + h
    assert local_parameters(cfg.model, 1).layer == 2 * h * h + 2 * h * kv + 3 * h * ffn + 2 * h


@pytest.mark.parametrize(
    "overrides",
    [("model.family=llama",), ("model.family=qwen3",), ("model.family=gpt2", "model.kv_heads=4")],
)
def test_activations_are_what_autograd_keeps(overrides: tuple[str, ...]) -> None:
    cfg = _job("model.kv_heads=2", *overrides)
    torch.manual_seed(0)
    model = Transformer(cfg.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    tokens = torch.randint(0, 512, (cfg.train.micro_batch, cfg.train.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    measured = sum(storage.nbytes() for storage in kept.values()) / 4
    # What the loss keeps (the head's gradients) is not an activation of the formula's layers.
    assert activation_elements(cfg) == pytest.approx(measured, rel=0.1)


def test_what_each_sharding_divides() -> None:
    ddp = estimate(_job("parallel.data.sharding=ddp", "train.dtype=bf16"))
    zero1 = estimate(_job("parallel.data.sharding=zero1", "train.dtype=bf16"))
    fsdp = estimate(_job("parallel.data.sharding=fsdp", "train.dtype=bf16", "train.global_batch=4"))
    n = local_parameters(_job().model, 1).total
    assert (ddp.parameters, ddp.gradients, ddp.masters, ddp.states) == (2 * n, 4 * n, 4 * n, 8 * n)
    assert (zero1.parameters, zero1.gradients, zero1.masters, zero1.states) == (2 * n, 4 * n, 2 * n, 4 * n)
    assert (fsdp.parameters, fsdp.gradients, fsdp.masters, fsdp.states) == (2 * n, 2 * n, 0, 4 * n)
    assert estimate(_job("parallel.data.sharding=fsdp")).gradients == 4 * n  # two micro-batches accumulate
    assert estimate(_job("train.dtype=fp64")).masters == 0


def test_optimizer_states() -> None:
    n = local_parameters(_job().model, 1).total
    ddp = "parallel.data.sharding=ddp"
    assert estimate(_job(ddp, "optim.name=sgd")).states == 0
    assert estimate(_job(ddp, "optim.name=sgd", "optim.momentum=0.9")).states == 4 * n


def test_a_large_model_has_the_size_that_everybody_knows() -> None:
    cfg = load(None, ["model.preset=llama3_8b", "data.name=stdlib", "train.seq_len=8192", "parallel.data.sharding=ddp"])
    memory = estimate(cfg)
    # 16 bytes a parameter of weights and states in mixed precision, 2 more for fp32 instead of bf16 gradients.
    weights = memory.parameters + memory.gradients + memory.masters + memory.states
    assert weights / GIB == pytest.approx(8.03e9 * 18 / GIB, rel=0.001)
    half = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, tp=2))
    assert estimate(half).total / memory.total == pytest.approx(0.5, abs=0.05)
