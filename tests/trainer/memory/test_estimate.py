"""The estimate of `pentad check` against real models: parameters exactly, activations by what autograd really keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pentad.configs import Config, load
from pentad.models.costs.flops import layer_flops
from pentad.models.costs.parameters import parameter_count
from pentad.models.costs.parts import Part
from pentad.models.mla import LatentAttention
from pentad.models.mtp import ahead
from pentad.models.sequences import Inputs
from pentad.models.transformer import Transformer
from pentad.parallel.comm.mesh import Axis
from pentad.parallel.context.gather import GatherLatent
from pentad.parallel.kernels.device import PlainMaths
from pentad.parallel.pipeline.memory import peak_activations
from pentad.trainer.memory.estimate import (
    GIB,
    activation_elements,
    estimate,
    layer_elements,
    local_parameters,
    per_rank,
)
from pentad.trainer.pipeline.programs import Pipeline, compute_program
from tests.jobs import DENSE

_SMALL = ["model.layers=3", "model.hidden=64", "model.heads=4", "model.ffn=160", "model.vocab=512", "train.seq_len=128"]
_LAYOUT = ["parallel.tp=1", "parallel.dp=2", "train.micro_batch=2", "train.global_batch=8", "train.dtype=fp32"]


def _job(*overrides: str) -> Config:
    return load(DENSE, [*_SMALL, *_LAYOUT, *overrides])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_parameters_of_one_rank_are_the_models(family: str) -> None:
    cfg = _job(f"model.family={family}", "model.kv_heads=4")
    with torch.device("meta"):
        model = Transformer(cfg.model)
    assert local_parameters(cfg.model, 1).total == sum(p.numel() for p in model.parameters())


_HYBRID = ["model.attention_every=2", "model.linear.key_dim=12", "model.linear.value_dim=20"]


def test_parameters_of_a_hybrid_stack_are_the_models() -> None:
    cfg = _job("model.kv_heads=2", *_HYBRID, "model.norm=layer")
    with torch.device("meta"):
        model = Transformer(cfg.model)
    found = sum(p.numel() for p in model.parameters())
    assert local_parameters(cfg.model, 1).total == parameter_count(cfg.model).total == found


_MOE = ["model.moe.experts=8", "model.moe.ffn=48"]
_LATENT = ["model.mla.kv_rank=24", "model.mla.nope_dim=16", "model.mla.rope_dim=8", "model.mla.value_dim=12"]
MIXTURES = {
    "mixtral": ["model.kv_heads=2"],
    "qwen2_moe": ["model.moe.shared=96", "model.moe.top_k=4"],
    "qwen3_moe": ["model.kv_heads=1", "model.head_dim=32"],
    "olmoe": ["model.moe.router.null_experts=4", "model.moe.top_k=3"],
    "deepseek_v2": [*_LATENT, "model.moe.shared=96", "model.moe.dense_layers=1"],
    "deepseek_v3": [*_LATENT, "model.mla.q_rank=40", "model.moe.shared=48", "model.moe.every=2", "model.qkv_bias=true"],
    "gpt_oss": ["model.kv_heads=2", "model.window=32"],
    "gpt2": ["model.moe.bias=true", "model.moe.shared=64", "model.moe.shared_gate=true"],
}


def _mixture(family: str, *overrides: str) -> Config:
    return _job(f"model.family={family}", "model.kv_heads=null", *_MOE, *MIXTURES[family], *overrides)


@pytest.mark.parametrize("family", MIXTURES)
def test_parameters_of_a_mixture_are_the_models(family: str) -> None:
    cfg = _mixture(family)
    with torch.device("meta"):
        parameters = dict(Transformer(cfg.model).named_parameters())
    local = local_parameters(cfg.model, 1)
    assert local.total == sum(p.numel() for p in parameters.values()) == parameter_count(cfg.model).total
    assert local.experts == sum(p.numel() for name, p in parameters.items() if ".moe.experts." in name) > 0


def test_expert_ranks_share_the_experts() -> None:
    whole, cut = (local_parameters(_mixture("mixtral").model, 2, ep=ep, etp=etp) for ep, etp in ((1, 1), (4, 2)))
    network, layers = 3 * 64 * 48, 3
    assert (whole.experts, cut.experts) == (layers * 8 * network, layers * 2 * network // 2)
    assert whole.total - whole.experts == cut.total - cut.experts
    biased = local_parameters(_mixture("gpt_oss").model, 1, ep=4, etp=2)
    assert biased.experts == layers * 2 * (network // 2 + 2 * 48 // 2 + 64)  # the second matrix's bias is not cut


def test_each_family_of_parameters_is_sharded_over_its_own_replicas() -> None:
    layout = ["parallel.tp=2", "parallel.dp=4", "train.dtype=bf16", "parallel.ep=2", "parallel.etp=2"]
    cfg = _mixture("mixtral", *layout)
    local = local_parameters(cfg.model, 2, ep=2, etp=2)
    memory = estimate(cfg)
    dense = local.total - local.experts
    assert memory.local == local and (memory.parameters, memory.gradients) == (2 * local.total, 4 * local.total)
    assert memory.masters == 4 * dense // 4 + 4 * local.experts // 2  # of 8 ranks, 2 have the same experts
    assert memory.states == 2 * memory.masters
    alone = estimate(_mixture("mixtral", *layout[:3], "parallel.ep=8"))
    assert alone.states == 8 * (dense // 4 + local_parameters(cfg.model, 2, ep=8).experts)


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
    [("model.family=llama",), ("model.family=qwen3",), ("model.family=gpt2", "model.kv_heads=4"), tuple(_HYBRID)],
)
def test_activations_are_what_autograd_keeps(overrides: tuple[str, ...]) -> None:
    cfg = _job("model.kv_heads=2", *overrides)
    assert activation_elements(cfg) == pytest.approx(_measured(cfg), rel=0.1)


def test_prediction_modules_count() -> None:
    cfg = _mixture("deepseek_v3", "model.mtp=2", "model.moe.router.null_experts=0")
    with torch.device("meta"):
        model = Transformer(cfg.model)
    assert local_parameters(cfg.model, 1).total == sum(p.numel() for p in model.parameters())
    assert activation_elements(cfg) == pytest.approx(_measured(cfg), rel=0.1)
    last = Part((2,), begins=False, embeds=False)
    with torch.device("meta"):
        stage = Transformer(cfg.model, last)
    assert local_parameters(cfg.model, 1, last).total == sum(p.numel() for p in stage.parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_activations_of_a_mixture_are_what_autograd_keeps(family: str) -> None:
    cfg = _mixture(family, "model.moe.router.null_experts=0")
    assert activation_elements(cfg) == pytest.approx(_measured(cfg), rel=0.1)


@pytest.mark.parametrize("method", ["allgather", "ulysses"])
def test_activations_of_latent_attention_over_context_ranks(method: str) -> None:
    """Gathered latents are expanded again in backward, so keys and values are not kept."""
    layout = ["parallel.cp=2", f"parallel.context.method={method}", "parallel.dp=1"]
    cfg = _mixture("deepseek_v3", "model.moe.router.null_experts=0", "model.layers=2", "model.moe.every=1", *layout)
    assert activation_elements(cfg) == pytest.approx(_measured(cfg), rel=0.05)


def _measured(cfg: Config) -> float:
    """Elements of floating point that autograd keeps of a forward pass, parameters left out."""
    torch.manual_seed(0)
    model = Transformer(cfg.model)
    if cfg.parallel.context.method == "allgather":
        for module in model.modules():
            if isinstance(module, LatentAttention):
                module.latent_core = GatherLatent(Axis.single("cp"), PlainMaths())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    tokens = torch.randint(0, 512, (cfg.train.micro_batch, cfg.train.seq_len // cfg.parallel.cp))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(Inputs(tokens, ahead(tokens, cfg.model.mtp) if cfg.model.mtp else tokens))
    # What the loss keeps (the head's gradients) is not an activation of the formula's layers.
    return sum(storage.nbytes() for storage in kept.values()) / 4


def test_what_each_sharding_divides() -> None:
    ddp = estimate(_job("parallel.data.sharding=ddp", "train.dtype=bf16"))
    zero1 = estimate(_job("parallel.data.sharding=zero1", "train.dtype=bf16"))
    fsdp = estimate(_job("parallel.data.sharding=fsdp", "train.dtype=bf16", "train.global_batch=4"))
    n = local_parameters(_job().model, 1).total
    assert (ddp.parameters, ddp.gradients, ddp.masters, ddp.states) == (2 * n, 4 * n, 4 * n, 8 * n)
    assert (zero1.parameters, zero1.gradients, zero1.masters, zero1.states) == (2 * n, 4 * n, 2 * n, 4 * n)
    assert (fsdp.parameters, fsdp.gradients, fsdp.masters, fsdp.states) == (2 * n, 2 * n, 0, 4 * n)
    assert estimate(_job("parallel.data.sharding=fsdp")).gradients == 4 * n  # two microbatches accumulate
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


def _pipeline(*overrides: str, layers: int = 8) -> Config:
    pp = ["parallel.pp=4", f"model.layers={layers}", "train.global_batch=96", "parallel.data.sharding=ddp"]
    return _job(*pp, *(o if "." in o else f"parallel.pipeline.{o}" for o in overrides))


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("vocab", ["ends", "balanced"])
def test_pipeline_ranks_hold_the_model_between_them(tied: str, vocab: str) -> None:
    cfg = _pipeline("model.family=llama", f"model.tied={tied}", f"vocab={vocab}")
    whole = local_parameters(cfg.model, 1)
    ranks = [memory.local for memory in per_rank(cfg)]
    table = cfg.model.hidden * 512
    copies = table if tied == "true" and vocab == "ends" else 0  # the tied table stands on both ends
    assert sum(rank.total for rank in ranks) == whole.total + copies
    if vocab == "balanced":
        tables = table * (1 if tied == "true" else 2) // 4
        assert [rank.rest for rank in ranks] == [tables, tables, tables, tables + 64]
    else:
        assert [rank.rest for rank in ranks] == [table, 0, 0, table + 64]


def test_activations_in_flight_are_the_programs() -> None:
    cfg = _pipeline("layers=[2, 2, 2, 2]")
    layer = 2 * layer_elements(cfg) * 4
    head = 3 * cfg.train.micro_batch * cfg.train.seq_len * cfg.model.hidden * 4
    assert [memory.activations for memory in per_rank(cfg)] == [4 * layer, 3 * layer, 2 * layer, layer + head]
    assert estimate(cfg).rank == 0 and estimate(cfg).activations == 4 * layer
    gpipe = per_rank(_pipeline("layers=[2, 2, 2, 2]", "schedule=gpipe"))
    assert gpipe[0].activations == 24 * layer  # 96 sequences over 2 replicas, 2 per microbatch
    uneven = per_rank(_pipeline("layers=[0, 1, 3, 4]"))
    assert [memory.activations for memory in uneven][:3] == [0, 3 * layer // 2, 3 * layer]


def test_recompute_keeps_the_inputs_of_the_layers() -> None:
    kept, full = _pipeline("layers=[2, 2, 2, 2]"), _pipeline("layers=[2, 2, 2, 2]", "memory.recompute=full")
    stream = kept.train.micro_batch * kept.train.seq_len * kept.model.hidden * 4
    assert per_rank(full)[0].activations == 4 * 2 * stream
    assert per_rank(full)[0].working == per_rank(kept)[0].working + layer_elements(kept) * 4


@pytest.mark.parametrize(
    "schedule", ["1f1b", "interleaved", "gis", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipev"]
)
def test_more_microbatches_hold_no_more(schedule: str) -> None:
    """What the estimate takes for the steady state: 4 pp microbatches and two groups."""
    vocabularies = ["ends", "balanced"] if schedule in ("1f1b", "interleaved", "gis", "v-half") else ["ends"]
    for vocab in vocabularies:
        cfg = _pipeline(f"schedule={schedule}", f"vocab={vocab}")
        pipeline = Pipeline.of(cfg)
        enough = 16 + 2 * (cfg.parallel.pipeline.group or 0)
        some, more = (peak_activations(compute_program(cfg, pipeline, m)) for m in (enough, 3 * enough))
        assert some == more


def test_stages_hold_what_their_layers_make() -> None:
    mixture = [*_MOE, "model.moe.top_k=4", "model.moe.dense_layers=2", "model.ffn=96"]
    cfg = _pipeline("model.family=mixtral", *mixture, "layers=[2, 2, 2, 2]")
    dense, routed = layer_elements(cfg, 0), layer_elements(cfg, 2)
    rows, h, f = 4 * cfg.train.micro_batch * cfg.train.seq_len, 64, 48
    router = 2 * 2 * 128 * 8
    assert routed - dense == rows * (2 * h + 3 * f) + router - 3 * 96 * rows // 4
    assert [memory.activations for memory in per_rank(cfg)][:3] == [8 * dense * 4, 6 * routed * 4, 4 * routed * 4]
    before = _pipeline("model.family=mixtral", *mixture, "layers=[2, 2, 2, 2]", "model.moe.weigh=before")
    assert routed - layer_elements(before, 2) == rows * h


def test_layers_are_split_by_their_own_cost() -> None:
    """Two dense layers of many times a mixture's work get a stage each; the passes' times are those of their layers."""
    wide = ["model.family=mixtral", *_MOE, "model.moe.dense_layers=2", "model.ffn=2048", "model.vocab=320"]
    pipeline = Pipeline.of(_pipeline(*wide))
    assert pipeline.split.layers == ((0,), (1,), (2, 3, 4), (5, 6, 7))
    forward = pipeline.times.forward
    assert forward[0] == forward[1] > 3 * forward[2]
    *costs, head = layer_flops(_pipeline(*wide).model, 128)
    assert forward[0] / forward[2] == pytest.approx(costs[0] / sum(costs[2:5]))
    assert forward[3] / forward[2] == pytest.approx((sum(costs[5:]) + 3 * head) / sum(costs[2:5]))
    assert sum(forward) - 3 * head / costs[0] * forward[0] == pytest.approx(4)
