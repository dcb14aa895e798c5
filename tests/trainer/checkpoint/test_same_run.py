"""A job that goes on from another one's checkpoint is told the keys, before any rank starts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import CheckpointConfig, Config, MoeConfig, SgdConfig, TextData
from pentad.trainer.checkpoint.check import checkpoint_problems
from pentad.trainer.checkpoint.checkpointer import write_full
from pentad.trainer.checkpoint.same_run import RunProgress, facts, run_problems
from pentad.trainer.checkpoint.saved_model import model_config_from_state
from tests.training import job

PRINT = "print f a print"


def _state(cfg: Config, step: int = 10, **changes: Any) -> dict[str, Any]:
    return RunProgress(step, step, 100, 0).as_dict() | facts(cfg, PRINT) | changes


def _saved(folder: Path, cfg: Config, **changes: Any) -> Path:
    path = folder / "step-00000010"
    write_full(path, {"model/embed.weight": torch.zeros(4)}, _state(cfg, **changes))
    return path


def _resuming(cfg: Config, path: Path) -> Config:
    return replace(cfg, checkpoint=CheckpointConfig(resume=str(path)))


CHANGES: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, Any]]]] = {
    "width": ({"model": {"hidden": 64}}, {"model.hidden": (32, 64)}),
    "depth": ({"model": {"layers": 3}}, {"model.layers": (2, 3)}),
    "several": ({"model": {"ffn": 96, "tied": True}}, {"model.ffn": (64, 96), "model.tied": ("false", "true")}),
    "experts": (
        {"model": {"moe": MoeConfig(experts=4, top_k=2, ffn=16)}},
        {"model.moe.experts": (0, 4)},
    ),
    "rotary base": ({"model": {"rope": None}}, {"model.rope.theta": ("10000.0", "500000.0")}),
    "seed": ({"seed": 1}, {"train.seed": (0, 1)}),
    "batch": ({"global_batch": 16}, {"train.global_batch": (8, 16)}),
    "length": ({"seq_len": 8}, {"train.seq_len": (16, 8)}),
    "precision": ({"dtype": "fp32"}, {"train.dtype": ("'fp64'", "'fp32'")}),
    "optimizer": ({"optim": "sgd"}, {"optim.name": ("'adamw'", "'sgd'")}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_has_changed_is_named_by_its_key_with_both_values(tmp_path: Path, kind: str) -> None:
    changes, expected = CHANGES[kind]
    before = job(dtype="fp64", seq_len=16, global_batch=8)
    settings = {"dtype": "fp64", "seq_len": 16, "global_batch": 8, **changes}
    if settings.get("model", {}).get("rope", 0) is None:
        settings["model"] = {"rope": replace(before.model.rope, theta=500000.0)}
    problems = checkpoint_problems(_resuming(job(**settings), _saved(tmp_path, before)))
    found = {problem.key: problem.message for problem in problems}
    assert expected.keys() <= found.keys() and all(key.startswith("model.") for key in found.keys() - expected.keys())
    for key, (old, new) in expected.items():
        assert f"was trained with {old}, not {new}; set {key}=" in found[key], found[key]


def test_what_may_change_may_change(tmp_path: Path) -> None:
    before = job(seq_len=16, global_batch=8, dtype="fp32")
    path = _saved(tmp_path, before)
    allowed = replace(
        job(seq_len=16, global_batch=8, tp=2, pp=2, model={"dropout": 0.1, "init_std": 0.5}, dtype="bf16", steps=99),
        eval=replace(before.eval, every=3),
    )
    assert run_problems(_state(before), allowed, path, PRINT) == []
    assert checkpoint_problems(_resuming(allowed, path)) == []


def test_momentum_is_kept_or_not_at_all(tmp_path: Path) -> None:
    def sgd(momentum: float) -> Config:
        return replace(job(), optim=SgdConfig(lr=0.1, momentum=momentum))

    assert run_problems(_state(sgd(0.9)), sgd(0.5), tmp_path) == []
    for old, new in ((0.9, 0.0), (0.0, 0.9)):
        assert [p.key for p in run_problems(_state(sgd(old)), sgd(new), tmp_path)] == ["optim.momentum"]


def test_other_data_is_named_by_its_keys_or_by_the_files(tmp_path: Path) -> None:
    before = replace(job(), data=TextData(paths=("a.txt",), holdout=0.1))
    after = replace(job(), data=TextData(paths=("b.txt", "c.txt"), holdout=0.1, prefetch=9))
    assert run_problems(_state(before), after, tmp_path, PRINT) == [], "the same tokens in other files"
    (problem,) = run_problems(_state(before), after, tmp_path, "other")
    assert problem.key == "data.paths" and "['a.txt'], not ['b.txt', 'c.txt']" in problem.message
    (problem,) = run_problems(_state(before), before, tmp_path, "other")
    assert problem.key == "data" and "other tokens" in problem.message and "bring the files back" in problem.message


def test_a_checkpoint_of_an_older_version_lacks_keys_and_still_fits(tmp_path: Path) -> None:
    cfg = job()
    state = _state(cfg)
    del state["data"], state["same"]["optim.name"], state["same"]["train.dtype"], state["same"]["optim.momentum"]
    del state["model"]["mtp"], state["model"]["moe"]
    assert run_problems(state, cfg, tmp_path, PRINT) == []
    (problem,) = run_problems(state, cfg, tmp_path, "other")
    assert problem.key == "data"


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "weights only": ({"same": None}, "holds weights and no run"),
    "a step that is none": ({"updates": "10"}, "updates is '10', not an integer"),
    "a negative step": ({"tokens": -1}, "tokens is -1"),
    "a list": ({"same": []}, "same is [], not an object"),
    "no model": ({"model": None}, "not a model"),
    "a key of no model": ({"model": {"layer": 2}}, "model.layer"),
    "a value of another type": ({"model": {"layers": "two"}}, "model.layers"),
    "a section that is none": ({"model": {"moe": 7}}, "model.moe"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_is_not_that_of_a_run_is_refused(tmp_path: Path, kind: str) -> None:
    changes, reason = STATES[kind]
    cfg = job()
    state = _state(cfg) | changes
    if state["same"] is None:
        del state["same"]
    path = tmp_path / "step-00000010"
    write_full(path, {"model/embed.weight": torch.zeros(4)}, state)
    problems = checkpoint_problems(_resuming(cfg, path))
    assert len(problems) == 1 and reason in str(problems[0]) and "\n" not in str(problems[0])


def test_a_model_comes_back_from_its_state() -> None:
    for model in ({}, {"moe": MoeConfig(experts=4, top_k=2, ffn=16)}, {"window": 8, "dropout": 1e-05}):
        cfg = job(model=model)
        assert model_config_from_state(facts(cfg, PRINT)) == cfg.model
    with pytest.raises(UserError):
        model_config_from_state({"model": {"layers": [2]}})


# Paths ----------------------------------------------------------------------------------------------------------


def _one(cfg: Config, **keys: Any) -> str:
    (problem,) = checkpoint_problems(replace(cfg, checkpoint=CheckpointConfig(**keys)))
    assert "\n" not in str(problem)
    return str(problem)


def test_checkpoints_that_cannot_be_used_are_found_before_any_rank_starts(tmp_path: Path) -> None:
    cfg = job()
    run = tmp_path / "run"
    path = _saved(run / "checkpoints", cfg)
    assert checkpoint_problems(_resuming(cfg, path)) == []
    for key in ("resume", "init"):
        assert f"is a folder of checkpoints; name one, such as {path}" in _one(cfg, **{key: str(path.parent)})
        assert f"is the folder of a run; name one of its checkpoints, such as {path}" in _one(cfg, **{key: str(run)})
        assert f"does not exist; there are {path}" in _one(cfg, **{key: str(path.parent / "step-00000011")})
        assert "is a file" in _one(cfg, **{key: str(path / "state.json")})
        assert "holds no checkpoint" in _one(cfg, **{key: str(tmp_path)})
    assert "no Hugging Face model" in _one(cfg, init=str(tmp_path))
    assert checkpoint_problems(replace(cfg, checkpoint=CheckpointConfig(init=str(path)))) == []
    wide = job(model={"hidden": 64})
    problem = _one(wide, init=str(path))
    assert problem.startswith("model.hidden: 64, but checkpoint.init=") and "has 32; set model.hidden=32" in problem


def test_latest_is_looked_at_as_the_run_will_find_it(tmp_path: Path) -> None:
    cfg = job()
    latest = replace(cfg, checkpoint=CheckpointConfig(resume="latest", dir=str(tmp_path)))
    assert checkpoint_problems(latest) == [], "nothing there: the run starts afresh"
    path = _saved(tmp_path, job(model={"hidden": 64}))
    (problem,) = checkpoint_problems(latest)
    assert problem.key == "model.hidden"
    write_full(tmp_path / "step-00000020", {"model/embed.weight": torch.zeros(4)}, _state(cfg, step=20))
    assert checkpoint_problems(latest) == []
    (tmp_path / "step-00000020" / "rank-00000-0.safetensors").write_bytes(b"")
    assert [p.key for p in checkpoint_problems(latest)] == ["model.hidden"], "the one before, as in the run"
    (path / "manifest.json").write_text("{}")
    assert _one(cfg, resume="latest", dir=str(tmp_path)).endswith("or name a good one")


def test_looking_at_checkpoints_needs_no_torch() -> None:
    code = "import sys, pentad.trainer.checkpoint.check as c; assert 'torch' not in sys.modules; print(c.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


@pytest.mark.parametrize("model", [{"layers": 2, "hidden": 8}, None, "model"])
def test_a_state_without_the_sizes_of_a_model_is_refused(model: Any) -> None:
    with pytest.raises(UserError) as caught:
        model_config_from_state({"model": model})
    keys = {problem.key for problem in caught.value.problems}
    assert keys == ({"model.heads", "model.ffn"} if isinstance(model, dict) else {"model"})
