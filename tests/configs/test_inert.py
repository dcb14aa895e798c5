"""Keys that decide nothing given the others: one line names those that the user wrote; the table of them is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pentad.configs import Config, load, preset_names, to_yaml, warnings
from pentad.configs.fields import value_of, with_value
from pentad.configs.inert import JOB, MODEL, differences, inert_keys
from pentad.models.moe import Experts
from pentad.models.routing.router import Router
from pentad.models.transformer import Transformer
from pentad.parallel.context.make import make_core
from pentad.parallel.kernels.device import local_attention
from pentad.trainer.pipeline.programs import Pipeline, training_program
from tests.training import Run

TINY = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.kv_heads=2", "model.ffn=48", "model.vocab=320"),
    *("model.init_std=0.1", "train.dtype=fp64", "train.seq_len=16", "train.steps=2", "train.global_batch=4"),
    *("train.micro_batch=2", "optim.schedule.warmup_steps=0", "train.device=cpu"),
]
MOE = ["model.moe.experts=4", "model.moe.ffn=32"]
GROUPS = ["model.moe.experts=8", "model.moe.router.groups=4", "model.moe.router.groups_kept=2"]
TWO_GPUS = ["parallel.ep=2", "parallel.dp=2", "train.dtype=bf16", "train.device=auto"]
LLAMA3 = ["model.rope.scaling=llama3", "model.rope.factor=4"]
YARN = ["model.rope.scaling=yarn", "model.rope.factor=4"]
Observe = Callable[[Config], object]


def trained(cfg: Config) -> object:
    """Losses and gradient norms of two steps, the buffers that these move, and the rows that experts got at once."""
    run, rows = Run(0, cfg), []
    try:
        for module in run.parts.model.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape)))
        numbers = [run.step(step) for step in range(2)]
        return numbers, {name: buffer.tolist() for name, buffer in run.parts.model.named_buffers()}, rows
    finally:
        run.close()


def program(cfg: Config) -> object:
    """The program of a step with four microbatches."""
    pipeline = Pipeline.of(cfg)
    return training_program(cfg, pipeline, 4, [1] * cfg.parallel.pp).hash, pipeline.split


def routed(cfg: Config) -> object:
    """Which parts of a microbatch of two ranks a router looks at, and the rows that it promises each expert."""
    asked: list[int] = []

    class Ranks:
        axis = SimpleNamespace(size=2)

        def gather(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            asked.append(x.shape[1])
            return torch.cat((x, x))

        def mine(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return x[: len(x) // 2]

    torch.manual_seed(0)
    router = Router(cfg.model, 0).double()
    torch.nn.init.normal_(router.weight)
    router.tokens = Ranks()  # type: ignore[assignment]
    seq: Any = SimpleNamespace(share=0.0, kept=None, places=torch.arange(8), rows=None, batch=1)
    routing = router(torch.randn(8, cfg.model.hidden, dtype=torch.float64), seq)
    return asked, routing.experts.tolist(), routing.weights.tolist(), routing.capacity


def context(cfg: Config) -> object:
    """The attention core of a job's ranks."""
    if cfg.parallel.cp == 1:
        return [str(getattr(layer.attention, "core", None)) for layer in Transformer(cfg.model).layers.values()]
    mesh: Any = SimpleNamespace(axis=lambda name: name)
    core = make_core(cfg.parallel.context, mesh, local_attention(torch.device("cpu")))
    return type(core), getattr(core, "duplex", None)


R = "model.moe.router"
PIPE, CTX = "parallel.pipeline", "parallel.context"
# (a job, a key that does nothing there, what makes it count, what tells)
CASES: list[tuple[list[str], str, list[str], Observe | None]] = [
    (["model.position=learned"], "model.rope.theta=3", ["model.position=rope"], trained),
    ([], "model.rope.factor=4", ["model.rope.scaling=linear"], trained),
    (
        ["model.rope.scaling=linear"],
        "model.rope.original_positions=8",
        YARN,
        trained,
    ),
    (
        [],
        "model.rope.low_freq_factor=2",
        [*LLAMA3, "model.rope.original_positions=8"],
        trained,
    ),
    (
        ["model.rope.scaling=llama3", "model.rope.factor=4"],
        "model.rope.beta_fast=2",
        ["model.rope.scaling=yarn"],
        trained,
    ),
    ([], "model.qk_norm_whole=true", ["model.qk_norm=true"], trained),
    ([], "model.mla.nope_dim=16", ["model.mla.kv_rank=8", "model.kv_heads=4"], trained),
    ([], "model.window_every=2", ["model.window=4"], trained),
    ([], "model.linear.key_dim=8", ["model.attention_every=2"], trained),
    (["model.attention_every=3"], "model.sinks=true", ["model.attention_every=2"], trained),
    ([], "model.mtp_loss=0.7", ["model.mtp=1"], trained),
    (MOE, "model.ffn_bias=true", ["model.moe.shared=16"], trained),
    ([], "model.moe.every=2", MOE, trained),
    ([], "model.moe.top_k=1", MOE, trained),
    (MOE, "model.moe.shared_gate=true", ["model.moe.shared=16"], trained),
    (MOE, "model.moe.drop=position", ["model.moe.capacity_factor=0.5"], trained),
    (MOE, "model.moe.capacity_scope=local", ["model.moe.capacity_factor=0.5"], routed),
    ([*MOE, f"{R}.name=expert_choice"], f"{R}.normalize=false", [f"{R}.name=top_k"], trained),
    (
        [*MOE, "model.moe.capacity_factor=1", "model.moe.capacity_scope=local", "model.moe.dispatcher=all_gather"],
        "model.moe.pad=true",
        ["model.moe.dispatcher=all_to_all"],
        trained,
    ),
    (
        [*MOE, "model.moe.dispatcher=all_gather"],
        "model.moe.overlap_chunks=4",
        ["model.moe.dispatcher=all_to_all"],
        trained,
    ),
    ([*MOE, f"{R}.name=sinkhorn", "model.moe.top_k=1"], f"{R}.score=sigmoid", ["model.moe.top_k=2"], trained),
    (MOE, f"{R}.group_members=1", GROUPS, trained),
    (MOE, f"{R}.bias_rate=0.5", [f"{R}.selection_bias=true"], trained),
    (MOE, f"{R}.aux_level=sequence", [f"{R}.aux_loss=0.1"], trained),
    (
        [
            *MOE,
            "model.moe.dispatcher=deepep",
            "parallel.ep=2",
            "parallel.dp=2",
            "train.dtype=bf16",
            "train.device=auto",
        ],
        "model.moe.overlap_chunks=4",
        ["model.moe.dispatcher=all_to_all"],
        None,
    ),
    ([], f"{PIPE}.schedule=gpipe", ["parallel.pp=2"], program),
    (["parallel.pp=2"], f"{PIPE}.vocab_barriers=2", [f"{PIPE}.vocab=balanced"], program),
    ([], "parallel.tensor.overlap=gemm", ["parallel.tp=2"], None),
    ([], f"{CTX}.method=allgather", ["parallel.cp=2"], context),
    (["parallel.data.sharding=fsdp2"], "parallel.data.bucket_mib=0.01", ["parallel.data.sharding=zero1"], None),
    (["parallel.data.sharding=fsdp2"], "parallel.data.states=1", ["parallel.data.sharding=zero1"], None),
    (["parallel.data.sharding=fsdp2"], "parallel.data.params=1", ["parallel.data.sharding=zero1"], None),
    (["parallel.data.sharding=fsdp2"], "parallel.data.grads=1", ["parallel.data.sharding=zero1"], None),
    (
        ["train.dtype=fp32", "parallel.dp=2"],
        "parallel.data.deepspeed.stage=3",
        ["parallel.data.sharding=deepspeed"],
        None,
    ),
    ([], "memory.host_gib=2", ["memory.offload_activations=all"], None),
    (["memory.offload_activations=all"], "memory.offload_disk=/tmp", ["memory.host_gib=2"], None),
    ([], "memory.optimizer_stride=2", ["memory.offload_optimizer=host"], None),
    (["memory.recompute=full"], "memory.recompute_parts=[ffn]", ["memory.recompute=selective"], None),
    (["memory.recompute=full"], "memory.token_share=0.5", ["memory.recompute=selective"], None),
    ([], "memory.recompute_every=2", ["memory.recompute=full"], None),
    ([], "optim.states_above=9", ["optim.states=int4"], None),
    ([], "memory.optimizer_subgroup_mib=1", ["memory.offload_optimizer=host"], None),
    ([], "hardware.peak_fp8_tflops=2", ["train.fp8=row"], None),
    ([], "data.tokenizer.eod=end", ["data.tokenizer.path=tokenizer.json"], None),
    (["data.name=bin", "data.paths=[tokens]"], "data.cache=elsewhere", ["data.name=text"], None),
    ([], "eval.steps=9", ["eval.every=1"], None),
    ([], "checkpoint.keep_best=3", ["eval.every=1"], None),
    (["checkpoint.keep=0"], "checkpoint.keep_every=4", ["checkpoint.keep=1"], None),
    ([], "checkpoint.local.keep=3", ["checkpoint.local.dir=/tmp", "checkpoint.local.every=2"], None),
    (["eval.every=1"], "eval.prompt_tokens=9", ["eval.prompts=[a]"], None),
    ([], "faults.spares=1", ["faults.recover=true"], None),
    (
        ["faults.recover=true", "faults.ladder=spare", "parallel.dp=2"],
        "faults.layouts=dp=1",
        ["faults.ladder=layouts"],
        None,
    ),
    (["faults.recover=true", "faults.ladder=spare"], "faults.grow=false", ["faults.ladder=shrink"], None),
    (["faults.watch=false"], "faults.pause_s=400", ["faults.watch=true"], None),
    ([], "faults.numerics.replicas_every=2", ["parallel.tp=2"], None),
    ([], "faults.numerics.recompute=true", ["memory.recompute=full"], None),
    (["faults.numerics.spikes=false"], "faults.numerics.on_spike=skip", ["faults.numerics.spikes=true"], None),
    ([], "log.wandb_project=mine", ["log.wandb=true"], None),
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the cases name."""
    monkeypatch.chdir(tmp_path)
    for name in ("tokens", "tokens.bin", "tokens.idx", "tokenizer.json"):
        (tmp_path / name).write_text("")


def _key(setting: str) -> str:
    return setting.partition("=")[0]


@pytest.mark.parametrize(("job", "setting", "counts", "observe"), CASES, ids=[_key(case[1]) for case in CASES])
def test_a_key_is_inert_or_counts(job: list[str], setting: str, counts: list[str], observe: Observe | None) -> None:
    key = _key(setting)
    with_it, without = load(None, [*TINY, *job, setting]), load(None, [*TINY, *job])
    assert with_value(with_it, key, value_of(without, key)) == without != with_it
    (line,) = [str(warning) for warning in warnings(with_it) if "no effect" in str(warning)]
    assert line == f"{key} has no effect with {inert_keys(with_it)[key]}"
    assert not [warning for warning in warnings(without) if "no effect" in str(warning)]

    counting, plain = load(None, [*TINY, *job, *counts, setting]), load(None, [*TINY, *job, *counts])
    assert not [warning for warning in warnings(counting) if key in str(warning)]
    if observe is not None:
        assert observe(with_it) == observe(without)
        assert observe(counting) != observe(plain)


def test_every_row_of_the_table_has_a_case() -> None:
    missing = {id(row): row for row in (*MODEL, *JOB)}
    for job, setting, counts, _ in CASES:
        before, after = (load(None, [*TINY, *job, *more]) for more in ((), counts))
        for row in MODEL:
            if row.covers(_key(setting).removeprefix("model.")) and row.holds(before.model) > row.holds(after.model):
                missing.pop(id(row), None)
        for row in JOB:
            if row.covers(_key(setting)) and row.holds(before) > row.holds(after):
                missing.pop(id(row), None)
    assert not missing


def test_the_keys_of_one_reason_stand_together_and_what_equals_the_default_is_not_named() -> None:
    job = [*TINY, f"{PIPE}.schedule=gis", "eval.steps=9", f"{PIPE}.vocab=ends", f"{PIPE}.group=2", f"{CTX}.inner=null"]
    (warning,) = warnings(load(None, job))
    assert str(warning) == (
        f"{PIPE}.schedule, {PIPE}.group have no effect with parallel.pp=1; eval.steps has no effect with eval.every=0"
    )


@pytest.mark.parametrize("preset", preset_names("models"))
def test_presets_and_what_show_prints_are_no_mistakes_of_the_user(preset: str, tmp_path: Path) -> None:
    config = load(None, [f"model.preset={preset}", "train.seq_len=16"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    for loaded in (config, load(tmp_path / "resolved.yaml")):
        assert not [warning for warning in warnings(loaded) if "no effect" in str(warning)]


def test_a_job_that_comes_with_pentad_is_no_mistake_of_the_user() -> None:
    for job in preset_names("jobs"):
        assert not warnings(load(job)), job
    alone = ["parallel.pp=1", "parallel.ep=1", "parallel.cp=1", "eval.every=0", "eval.prompts=[]"]
    config = load("demo", alone)
    assert "parallel.pipeline.schedule" in inert_keys(config)
    assert not warnings(config)


def test_models_that_differ_in_inert_keys_are_the_same() -> None:
    for job, setting, *_ in CASES:
        one, other = (load(None, [*TINY, *job, *more]).model for more in ((), (setting,)))
        assert not differences(one, other), setting
