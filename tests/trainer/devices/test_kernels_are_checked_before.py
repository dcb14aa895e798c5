"""What the checks of kernels accept, the job starts; what the job refuses, they refuse before, with the same words."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from pentad.configs import UserError, load
from pentad.configs.schema import Config, MoeConfig, RouterConfig
from pentad.configs.validation import kernels as validate_kernels
from pentad.trainer.devices import visible as devices
from pentad.trainer.preflight import preflight
from tests.distributed import run_distributed
from tests.jobs import DENSE
from tests.training import curve, job

PADDED = {"pad": True, "capacity_factor": 1.0, "capacity_scope": "local"}
CHOICE = {"router": RouterConfig(name="expert_choice")}


def _job(moe: dict[str, Any], **settings: Any) -> Config:
    model = {"moe": MoeConfig(**{"experts": 4, "top_k": 2, "ffn": 16, **moe}), **settings.pop("model", {})}
    return job(model=model, steps=1, **settings)


def _outcome(rank: int, world: int, cfg: Config) -> str:
    """What stops the job, or nothing."""
    try:
        curve(rank, world, cfg)
    except UserError as error:
        return error.problems[0].key
    return ""


BMM, GROUPED = {"compute": "bmm"}, {"compute": "grouped_mm"}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (BMM, {}),
    ({**BMM, **PADDED}, {}),
    ({**BMM, **PADDED, "overlap_chunks": 2}, {}),
    ({**BMM, **PADDED, "dispatcher": "all_gather"}, {}),
    ({**BMM, "experts": 1, "top_k": 1}, {}),
    ({**BMM, "capacity_factor": 1.0}, {}),
    ({**BMM, **CHOICE}, {}),
    ({**BMM, **CHOICE, "dispatcher": "all_gather"}, {}),
    ({**BMM, **CHOICE, "overlap_chunks": 2}, {}),
    ({**BMM, **CHOICE}, {"tp": 2, "ep": 2}),
    ({**BMM, **CHOICE}, {"tp": 2}),
    ({**BMM, "experts": 2, "top_k": 1}, {"dp": 2, "ep": 2}),
    ({**BMM, **PADDED}, {"dp": 2, "ep": 2}),
    (GROUPED, {}),
    (GROUPED, {"dtype": "fp32"}),
    (GROUPED, {"dtype": "bf16"}),
    ({**GROUPED, "ffn": 12}, {"dtype": "fp32"}),
    ({**GROUPED, "ffn": 12}, {"dtype": "bf16"}),
    ({**GROUPED, "ffn": 24}, {"tp": 2, "etp": 2, "dtype": "fp32"}),
    ({**GROUPED, "ffn": 24}, {"tp": 2, "etp": 2, "dtype": "bf16"}),
    ({**GROUPED, "ffn": None}, {"dtype": "bf16", "model": {"ffn": 36}}),
    (GROUPED, {"dtype": "bf16", "model": {"hidden": 36}}),
    ({"dispatcher": "deepep"}, {}),
    ({"dispatcher": "deepep"}, {"tp": 2, "etp": 2}),
]


@pytest.mark.distributed
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_check_and_the_job_agree(case):
    moe, settings = CASES[case]
    cfg = _job(dict(moe), **settings)
    world = cfg.parallel.ranks
    before = {problem.key for problem in validate_kernels.validate_kernels(cfg)}
    assert set(run_distributed(_outcome, world, cfg, group=False)) == (before or {""})


def _problems(*overrides: str) -> dict[str, str]:
    try:
        preflight(load(DENSE, overrides))
    except UserError as error:
        return {problem.key: problem.message for problem in error.problems}
    return {}


EXPERTS = ("model.family=mixtral", "model.moe.experts=4", "parallel.ep=2", "train.dtype=bf16")


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["train.device=cuda"], "train.device", ["no GPU is visible", "set train.device=auto or cpu"]),
        (["optim.impl=apex"], "optim.impl", ["a GPU", "none is visible", "set optim.impl=fused"]),
        (["optim.impl=apex", "train.device=cpu"], "optim.impl", ["train.device=cpu", "set optim.impl=fused"]),
        (["model.norm_impl=apex"], "model.norm_impl", ["a GPU", "none is visible", "set model.norm_impl=torch"]),
        (
            ["model.norm_impl=apex", "train.device=cpu"],
            "model.norm_impl",
            ["train.device=cpu", "model.norm_impl=torch"],
        ),
        (
            ["train.kernels=triton", "train.dtype=bf16"],
            "train.kernels",
            ["a GPU", "none is visible", "set train.kernels=torch"],
        ),
        (["train.kernels=triton", "train.device=cpu"], "train.kernels", ["train.device=cpu", "train.kernels=torch"]),
        (["train.kernels=triton", "train.dtype=fp32"], "train.kernels", ["bf16", "fp32", "set train.kernels=torch"]),
        (["optim.impl=apex", "train.dtype=fp64"], "optim.impl", ["fp32", "fp64", "set optim.impl=fused"]),
        ([*EXPERTS, "model.moe.dispatcher=deepep"], "model.moe.dispatcher", ["CUDA devices", "all_to_all"]),
        (
            [*EXPERTS, "model.moe.dispatcher=deepep", "train.device=cpu"],
            "model.moe.dispatcher",
            ["train.device=cpu", "all_to_all"],
        ),
        (
            [*EXPERTS, "model.moe.dispatcher=deepep", "train.dtype=fp32"],
            "model.moe.dispatcher",
            ["bfloat16", "fp32", "set train.dtype=bf16"],
        ),
        ([*EXPERTS, "model.moe.compute=bmm"], "model.moe.compute", ["equally many rows", "model.moe.pad"]),
    ],
)
def test_a_machine_without_gpus_refuses_what_needs_one(monkeypatch, overrides, key, words):
    monkeypatch.setattr(devices, "_DRIVERS", ())
    found = _problems(*overrides)
    assert found.keys() == {key}
    assert all(word in found[key] for word in words)


def test_on_gpus_the_packages_are_looked_for(monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: 8)
    overrides = [*EXPERTS, "model.moe.dispatcher=deepep", "optim.impl=apex", "train.device=cuda"]
    found = _problems(*overrides)
    assert "NVIDIA apex" in found.pop("optim.impl") and "deep_ep" in found.pop("model.moe.dispatcher") and not found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert _problems(*overrides) == {}
