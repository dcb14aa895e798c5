"""DeepSpeed's engine, the real package: the same training as ours, and checkpoints that go both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.schema import Config, ConstantSchedule, MoeConfig, RouterConfig, SgdConfig
from pentad.trainer.checkpoint.state import units_by_key
from tests.distributed import run_distributed
from tests.same_training import reference, worst
from tests.trainer.checkpoint.test_resume import straight, text_job, train
from tests.trainer.numerics.test_non_finite import broken
from tests.trainer.test_evaluation import evaluated
from tests.trainer.text.test_samples import sampled
from tests.training import Run, curve, job

SGD = SgdConfig(lr=0.1, momentum=0.5, weight_decay=0.1, schedule=ConstantSchedule())


def engine(stage: int, **settings: Any) -> dict[str, Any]:
    """Arguments of `job`; with ZeRO 3 no parameter is whole between its uses, however small."""
    own = {"stage": stage, **{key: settings.pop(key) for key in ("offload", "config") if key in settings}}
    return {"dp": 2, "sharding": "deepspeed", "dtype": "fp32", "deepspeed": own, **settings}


@pytest.fixture(scope="module")
def gathering(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DeepSpeed keeps small parameters whole; with this file it gathers all of them for every use."""
    path = tmp_path_factory.mktemp("deepspeed") / "zero3.json"
    zero = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": "auto", **zero}}))
    return str(path)


def _trained(rank: int, world: int, cfg: Config) -> tuple[list[tuple[float, float, float]], list[Any]]:
    """The curve, and the parts of the masters that a rank has."""
    run = Run(rank, cfg)
    try:
        curve = [run.step(step) for step in range(cfg.train.steps)]
        units = units_by_key(run.parts.replicas)
        pieces = [
            (p.name, p.start, units[p.unit].value[p.at :][: p.stop - p.start]) for p in run.parts.replicas.pieces()
        ]
        return curve, [(name, start, value.clone()) for name, start, value in pieces]
    finally:
        run.close()


ROUTER = RouterConfig(groups_kept=1, selection_bias=True, bias_rate=0.01, aux_loss=0.05, z_loss=1e-3)
EXPERTS = {"moe": MoeConfig(experts=4, top_k=2, ffn=24, router=ROUTER)}
CASES: dict[str, dict[str, Any]] = {
    "zero 1": engine(1),
    "zero 2": engine(2),
    "zero 3": engine(3),
    "zero 1, host": engine(1, offload="optimizer"),
    "zero 2, host": engine(2, offload="optimizer"),
    "zero 3, host": engine(3, offload="all"),
    "zero 1, tp": engine(1, tp=2),
    "zero 3, tp": engine(3, tp=2),
    "zero 2, cp": engine(2, cp=2),
    "zero 3, cp": engine(3, cp=2),
    "zero 2, recompute": engine(2, recompute="full"),
    "zero 3, recompute": engine(3, recompute="selective"),
    "zero 3, tied": engine(3, model={"tied": True, "mtp": 1}),
    "zero 2, experts": engine(2, model=EXPERTS),
    "zero 3, experts": engine(3, model=EXPERTS),
    "zero 3, experts, tp": engine(3, tp=2, etp=2, model=EXPERTS),
    "zero 2, three ranks": engine(2, dp=3, global_batch=6),
    "zero 3, three ranks": engine(3, dp=3, global_batch=6),
}
ALWAYS = {"zero 1", "zero 2", "zero 3"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in CASES]
)
@pytest.mark.parametrize("optim", [SGD, pytest.param("adamw", marks=pytest.mark.slow)], ids=["sgd", "adamw"])
def test_trains_like_one_process(name: str, optim: Any, gathering: str) -> None:
    wanted = {**CASES[name], "optim": optim}
    if wanted["deepspeed"]["stage"] == 3:
        wanted["deepspeed"] = {**wanted["deepspeed"], "config": gathering}
    cfg = job(**wanted)
    ranks = run_distributed(_trained, cfg.parallel.ranks, cfg, group=False)
    one = {"tp": 1, "etp": 1, "cp": 1, "dp": 1, "sharding": "ddp", "recompute": "none", "deepspeed": None}
    alone = reference(job(**{**wanted, **one}), False)
    assert alone.curve[-1][0] < 0.95 * alone.curve[0][0]
    assert worst([curve for curve, _ in ranks], alone.curve) < 1e-5
    if optim == SGD and cfg.parallel.tp == 1:
        _compare(ranks, {name: value for name, (_, value) in alone.slices.items()})


def _compare(ranks: list[Any], whole: dict[str, torch.Tensor]) -> None:
    """Every element is some rank's, and has the value that it has in one process."""
    for name, value in whole.items():
        mine = torch.full_like(value, torch.nan).view(-1)
        for _, parts in ranks:
            for other, start, part in parts:
                if other == name:
                    mine[start : start + len(part)] = part
        assert torch.linalg.vector_norm(mine - value.view(-1)) <= 1e-5 * torch.linalg.vector_norm(value), name


def _around_a_bad_step(rank: int, world: int, cfg: Config) -> list[tuple[float, float, float]]:
    run = Run(rank, cfg)
    try:
        found = [run.step(0)]
        with broken(run, "output", 1):
            found.append(run.step(1))
        return [*found, run.step(2), run.step(3)]
    finally:
        run.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["zero 3", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if "2, host" in name)]
)
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    """DeepSpeed leaves out such a step itself; what it leaves behind is what ours leaves."""
    ours = run_distributed(_around_a_bad_step, 2, job(**OURS["zero1"]), group=False)[0]
    theirs = run_distributed(_around_a_bad_step, 2, job(**CASES[name]), group=False)[0]
    assert [step[2] for step in theirs] == [step[2] for step in ours] == [0, 1, 0, 0]
    for step in (0, 2, 3):
        assert theirs[step] == pytest.approx(ours[step], rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero 1", "zero 3", "zero 3, tp", "zero 3, host"])
def test_evaluations_and_texts_are_those_of_ours(name: str, gathering: str) -> None:
    """Between steps, also of parameters that are in pieces then."""
    model = {"vocab": 64, "layers": 4, "init_std": 0.4}
    wanted = {**CASES[name], "model": model}
    wanted["deepspeed"] = {**wanted["deepspeed"], "config": gathering}
    cfg = job(**wanted)
    ours = job(**OURS["zero1"], model=model)
    texts, expected = (run_distributed(sampled, c.parallel.ranks, c, True, group=False)[0] for c in (cfg, ours))
    assert texts == expected
    losses, expected = (run_distributed(evaluated, c.parallel.ranks, c, False, -1, group=False)[0] for c in (cfg, ours))
    assert losses == pytest.approx(expected, rel=1e-5)


ZERO: list[tuple[int, dict[str, Any]]] = [
    (1, {"overlap_comm": True}),
    (2, {"overlap_comm": True, "contiguous_gradients": False}),
    (2, {"reduce_scatter": False, "allgather_partitions": False}),
    (2, {"reduce_bucket_size": 700, "allgather_bucket_size": 500, "ignore_unused_parameters": False}),
    (3, {"overlap_comm": True, "reduce_scatter": False}),
    (3, {"contiguous_gradients": False, "sub_group_size": 2000}),
    (3, {"sub_group_size": 2000, "offload_optimizer": {"device": "cpu", "pin_memory": True}}),
    (3, {"reduce_bucket_size": 700, "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 10}),
    (3, {"stage3_prefetch_bucket_size": 100, "stage3_param_persistence_threshold": 50}),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "zero"), ZERO)
def test_what_is_passed_on_changes_no_training(stage: int, zero: dict[str, Any], tmp_path: Path) -> None:
    """Where masters and gradients lie, and when what is sent, is up to the user's JSON."""
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **zero}}))
    cfg = job(**engine(stage, config=str(file), steps=4))
    ranks = run_distributed(curve, 2, cfg, group=False)
    assert worst(ranks, run_distributed(curve, 2, job(**OURS["zero1"], steps=4), group=False)[0]) < 1e-5


OURS: dict[str, dict[str, Any]] = {
    "zero1": {"dp": 2, "sharding": "zero1", "dtype": "fp32"},
    "ddp": {"dp": 2, "sharding": "ddp", "dtype": "fp32"},
    "tp": {"tp": 2, "dtype": "fp32"},
}
CHAINS = [
    ("zero1", "zero 3", "ddp"),
    ("zero 1", "zero1", "zero 2"),
    ("ddp", "zero 2, host", "zero 3, host"),
    ("zero 3, tp", "tp", "zero 1"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("chain", [CHAINS[0], *(pytest.param(chain, marks=pytest.mark.slow) for chain in CHAINS[1:])])
def test_resumes_both_ways(tmp_path: Path, chain: tuple[str, ...]) -> None:
    """Twenty steps of ours, or some of each: masters and moments go with the checkpoint."""
    wanted = straight(tmp_path, 2, text_job(tmp_path, **OURS["zero1"]))
    assert wanted[-1][1] < 0.95 * wanted[0][1]
    rows = []
    for name, until in zip(chain, (7, 13, 20), strict=True):
        cfg = text_job(tmp_path, **(OURS | CASES)[name])
        rows += run_distributed(train, cfg.parallel.ranks, cfg, tmp_path / "run", until, group=False)[0][0]
    assert [row[0] for row in rows] == list(range(1, 21))
    for mine, theirs in zip(rows, wanted, strict=True):
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_resumes_bit_for_bit(tmp_path: Path, stage: int) -> None:
    """fp32 masters beside bf16 parameters; near ours, whose gradients are summed in fp32 before they are rounded."""
    cfg = text_job(tmp_path, deterministic=True, **engine(stage, dtype="bf16"))
    wanted = straight(tmp_path, 2, cfg)
    rows = [
        row for until in (10, 20) for row in run_distributed(train, 2, cfg, tmp_path / "run", until, group=False)[0][0]
    ]
    assert rows == wanted
    ours = straight(tmp_path / "ours", 2, text_job(tmp_path, **{**OURS["zero1"], "dtype": "bf16"}))
    assert [row[1] for row in wanted] == pytest.approx([row[1] for row in ours], rel=5e-3)
