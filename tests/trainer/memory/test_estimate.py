"""The memory model against real models: parameters and buckets to the byte, activations as the program holds them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pentad.configs import Config, load
from pentad.models.costs.activations import layer_rows
from pentad.models.costs.flops import layer_flops
from pentad.models.costs.kept import kept_bytes
from pentad.models.costs.parameters import parameter_count
from pentad.models.costs.parts import Part
from pentad.models.costs.tensors import Cut, ParameterTensor, parameter_tensors
from pentad.models.transformer import Transformer
from pentad.parallel.pipeline.memory import peak_activations
from pentad.trainer.memory.estimate import GIB, enough, estimate, per_rank
from pentad.trainer.memory.stages import bench_of, ways_of
from pentad.trainer.pipeline.programs import Pipeline, compute_program
from tests.jobs import DENSE

_SMALL = ["model.layers=3", "model.hidden=64", "model.heads=4", "model.ffn=160", "model.vocab=512", "train.seq_len=128"]
_LAYOUT = ["parallel.tp=1", "parallel.dp=2", "train.micro_batch=2", "train.global_batch=8", "train.dtype=fp32"]


def _job(*overrides: str) -> Config:
    return load(DENSE, [*_SMALL, *_LAYOUT, "train.device=cpu", *overrides])


_LAYER_1 = [(half, 1) for half in ("attention", "out", "ffn", "down")]


def _elements(tensors: list[ParameterTensor]) -> int:
    return sum(tensor.elements for tensor in tensors)


def _made(cfg: Config, part: Part | None = None) -> list[tuple[str, int]]:
    with torch.device("meta"):
        model = Transformer(cfg.model, part)
    return [(name, p.numel()) for name, p in model.named_parameters()]


_LATENT = ["model.mla.kv_rank=24", "model.mla.nope_dim=16", "model.mla.rope_dim=8", "model.mla.value_dim=12"]
_MOE = ["model.moe.experts=8", "model.moe.ffn=48"]
MODELS = {
    "llama": ["model.kv_heads=4"],
    "qwen2": ["model.kv_heads=4"],
    "qwen3": ["model.kv_heads=4"],
    "gpt2": ["model.kv_heads=4"],
    "hybrid": ["model.kv_heads=2", "model.attention_every=2", "model.linear.key_dim=12", "model.norm=layer"],
    "mixtral": ["model.kv_heads=2", *_MOE],
    "qwen2_moe": ["model.moe.shared=96", "model.moe.top_k=4", *_MOE],
    "qwen3_moe": ["model.kv_heads=1", "model.head_dim=32", *_MOE],
    "olmoe": ["model.moe.router.null_experts=4", "model.moe.top_k=3", *_MOE],
    "deepseek_v2": [*_LATENT, *_MOE, "model.moe.shared=96", "model.moe.dense_layers=1"],
    "deepseek_v3": [*_LATENT, *_MOE, "model.mla.q_rank=40", "model.moe.shared=48", "model.qkv_bias=true"],
    "gpt_oss": ["model.kv_heads=2", "model.window=32", *_MOE],
    "gated": ["model.kv_heads=4", *_MOE, "model.moe.bias=true", "model.moe.shared=64", "model.moe.shared_gate=true"],
    "ahead": [*_LATENT, *_MOE, "model.mla.q_rank=40", "model.mtp=2"],
}


def _model(name: str, *overrides: str) -> Config:
    family = {"hybrid": "llama", "gated": "gpt2", "ahead": "deepseek_v3"}.get(name, name)
    heads = [] if any("kv_heads" in each for each in MODELS[name]) else ["model.kv_heads=null"]
    return _job(f"model.family={family}", *heads, *MODELS[name], *overrides)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_models(name: str) -> None:
    cfg = _model(name)
    found = parameter_tensors(cfg.model, Cut())
    assert [(tensor.name, tensor.elements) for tensor in found] == _made(cfg)
    assert _elements(found) == parameter_count(cfg.model).total
    assert all(tensor.expert == (".moe.experts." in tensor.name) for tensor in found)
    last = Part((2,), begins=False, embeds=False)
    assert [(tensor.name, tensor.elements) for tensor in parameter_tensors(cfg.model, Cut(), last)] == _made(cfg, last)


def test_expert_ranks_share_the_experts() -> None:
    def of(name: str, *, tp: int = 1, ep: int = 1, etp: int = 1) -> tuple[int, int]:
        tensors = parameter_tensors(_model(name).model, Cut(tp=tp, ep=ep, etp=etp))
        return _elements([t for t in tensors if t.expert]), _elements([t for t in tensors if not t.expert])

    network, layers = 3 * 64 * 48, 3
    (whole, rest), (mine, others) = of("mixtral", tp=2), of("mixtral", tp=2, ep=4, etp=2)
    assert (whole, mine, rest) == (layers * 8 * network, layers * 2 * network // 2, others)
    # The second matrix's bias is not cut.
    assert of("gpt_oss", ep=4, etp=2)[0] == layers * 2 * (network // 2 + 2 * 48 // 2 + 64)


def test_each_family_of_parameters_is_sharded_over_its_own_replicas() -> None:
    layout = ["parallel.tp=2", "parallel.dp=4", "train.dtype=bf16", "parallel.ep=2", "parallel.etp=2"]
    held = estimate(_model("mixtral", *layout)).held
    dense = held.local - held.experts
    assert (held.parameters, held.gradients) == (pytest.approx(2 * held.local, rel=0.01), 2 * held.parameters)
    # Of 8 ranks, 2 have the same experts.
    assert held.masters == pytest.approx(4 * dense // 4 + 4 * held.experts // 2, rel=0.02)
    assert held.states == 2 * held.masters
    alone = estimate(_model("mixtral", *layout[:3], "parallel.ep=8")).held
    assert alone.states == pytest.approx(8 * (dense // 4 + alone.experts), rel=0.02)


def test_tensor_parallel_ranks_share_matrices_and_copy_norms_and_scarce_key_heads() -> None:
    cfg = _job("model.kv_heads=2", "model.tied=true", "model.family=llama")
    h, kv, ffn, vocab = 64, 2 * 16, 160, 512

    def layer(tp: int) -> int:
        return _elements([t for t in parameter_tensors(cfg.model, Cut(tp=tp)) if t.group in _LAYER_1])

    # Four ranks and two key heads of width 16: every rank holds one.
    assert layer(4) == 2 * h * h // 4 + 2 * h * 16 + 3 * h * ffn // 4 + 2 * h
    assert layer(1) == 2 * h * h + 2 * h * kv + 3 * h * ffn + 2 * h
    assert _elements(parameter_tensors(cfg.model, Cut(tp=4))) == 3 * layer(4) + vocab * h // 4 + h


def test_what_each_sharding_divides() -> None:
    ddp = estimate(_job("parallel.data.sharding=ddp", "train.dtype=bf16")).held
    zero1 = estimate(_job("parallel.data.sharding=zero1", "train.dtype=bf16")).held
    fsdp = estimate(_job("parallel.data.sharding=fsdp2", "train.dtype=bf16", "train.global_batch=4")).held
    n = ddp.parameters // 2
    assert n == pytest.approx(parameter_count(_job().model).total, rel=0.001)
    assert (ddp.gradients, ddp.masters, ddp.states) == (4 * n, 4 * n, 8 * n)
    assert (zero1.parameters, zero1.gradients, zero1.masters, zero1.states) == (2 * n, 4 * n, 2 * n, 4 * n)
    n = fsdp.local
    assert (fsdp.parameters, fsdp.gradients, fsdp.masters, fsdp.states) == (2 * n, 2 * n, 0, 4 * n)
    assert estimate(_job("parallel.data.sharding=fsdp2")).held.gradients == 4 * n  # two microbatches accumulate
    assert estimate(_job("train.dtype=fp64")).held.masters == 0


def test_optimizer_states() -> None:
    ddp = "parallel.data.sharding=ddp"
    n = estimate(_job(ddp)).held.gradients
    assert estimate(_job(ddp, "optim.name=sgd")).held.states == 0
    assert estimate(_job(ddp, "optim.name=sgd", "optim.momentum=0.9")).held.states == n


def test_a_large_model_has_the_size_that_everybody_knows() -> None:
    cfg = load(None, ["model.preset=llama3_8b", "data.name=stdlib", "train.seq_len=8192", "parallel.data.sharding=ddp"])
    memory = estimate(cfg)
    held = memory.held
    # 16 bytes a parameter of weights and states in mixed precision, 2 more for fp32 instead of bf16 gradients.
    weights = held.parameters + held.gradients + held.masters + held.states
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
    table = cfg.model.hidden * 512
    copies = table if tied == "true" and vocab == "ends" else 0  # the tied table stands on both ends
    assert sum(rank.held.local for rank in per_rank(cfg)) == parameter_count(cfg.model).total + copies


def _layer(cfg: Config, layer: int = 0) -> int:
    return kept_bytes(layer_rows(cfg.model, layer, bench_of(cfg, ways_of(cfg)).work))


def test_activations_in_flight_are_the_programs() -> None:
    cfg = _pipeline("layers=[2, 2, 2, 2]")
    layer, stream = 2 * _layer(cfg), cfg.train.micro_batch * cfg.train.seq_len * cfg.model.hidden * 4
    angles = 128 * cfg.model.head_dim * 4
    ranks = per_rank(cfg)
    assert [memory.in_flight for memory in ranks] == [4, 3, 2, 1]
    # What is received lies in a slot.
    kept = [layer + angles, *[layer + angles - stream] * 3]
    first, second = ranks[:2]
    assert (first.activations, second.activations) == (4 * kept[0], 3 * kept[1])
    gpipe = per_rank(_pipeline("layers=[2, 2, 2, 2]", "schedule=gpipe"))
    assert gpipe[0].in_flight == 24  # 96 sequences over 2 replicas, 2 per microbatch
    assert gpipe[0].activations == 24 * kept[0]
    uneven = per_rank(_pipeline("layers=[0, 1, 3, 4]"))
    assert uneven[2].activations == 2 * (3 * layer // 2 + angles - stream)


def test_recompute_keeps_the_inputs_of_the_layers() -> None:
    full = _pipeline("layers=[2, 2, 2, 2]", "memory.recompute=full")
    stream = full.train.micro_batch * full.train.seq_len * full.model.hidden * 4
    memory = per_rank(full)[0]
    assert memory.activations == 4 * (2 * stream + 128 * full.model.head_dim * 4)
    # One layer's forward pass, all of it at the end, beside its gradient.
    assert _layer(full) < memory.working < 2 * _layer(full)


@pytest.mark.parametrize(
    "schedule", ["1f1b", "interleaved", "gis", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipev"]
)
def test_more_microbatches_hold_no_more(schedule: str) -> None:
    """What the estimate takes for the steady state."""
    vocabularies = ["ends", "balanced"] if schedule in ("1f1b", "interleaved", "gis", "v-half") else ["ends"]
    for vocab in vocabularies:
        cfg = _pipeline(f"schedule={schedule}", f"vocab={vocab}")
        pipeline = Pipeline.of(cfg)
        some, more = (peak_activations(compute_program(cfg, pipeline, m)) for m in (enough(cfg, 1000), 48))
        assert some == more


def test_stages_hold_what_their_layers_make() -> None:
    mixture = [*_MOE, "model.moe.top_k=4", "model.moe.dense_layers=2", "model.ffn=96"]
    cfg = _pipeline("model.family=mixtral", *mixture, "layers=[2, 2, 2, 2]")
    dense, routed, angles = _layer(cfg, 0), _layer(cfg, 2), 128 * cfg.model.head_dim * 4
    stream = 2 * 128 * 64 * 4
    assert dense != routed
    ranks = per_rank(cfg)
    assert ranks[0].activations == 4 * (2 * dense + angles)
    assert ranks[1].activations == 3 * (2 * routed + angles - stream)
    before = _pipeline("model.family=mixtral", *mixture, "layers=[2, 2, 2, 2]", "model.moe.weigh=before")
    rows = 4 * cfg.train.micro_batch * cfg.train.seq_len
    assert routed - _layer(before, 2) == rows * 64 * 4 - rows * 4  # results, and their weights instead


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
