"""Checkpoints made of checkpoints: jobs go on from them as from the source; means against numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import MoeConfig
from pentad.launch.cli import main
from pentad.trainer.checkpoint.checkpointer import read_full, verify
from pentad.trainer.checkpoint.listing import listed_checkpoint
from pentad.trainer.checkpoint.rewriting import rewrite
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.processes.signals import StopRequest
from pentad.trainer.trainer import Trainer
from tests.trainer.checkpoint.test_resume import Curve, text_job
from tests.training import open_trainer

MODELS: dict[str, dict[str, Any]] = {"dense": {}, "moe": {"moe": MoeConfig(experts=4, top_k=2, ffn=16)}}


def _job(folder: Path, kind: str, steps: int) -> Any:
    cfg = text_job(folder, model=MODELS[kind])
    checkpoint = replace(cfg.checkpoint, every=2, keep=0, asynchronous=False)
    return replace(cfg, train=replace(cfg.train, steps=steps, global_batch=2), checkpoint=checkpoint)


def _train(trainer: Trainer) -> list[tuple[int, float, float]]:
    curve = Curve()
    trainer.train(Outputs(curve, curve), StopRequest())  # type: ignore[arg-type]
    trainer.checkpointer.close()
    return curve.rows


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with checkpoints of steps 2 and 4, and its kind."""
    folder = tmp_path_factory.mktemp(request.param)
    _train(open_trainer(0, _job(folder, request.param, 4), folder)[1])
    return folder, request.param


def _goes_on(run: tuple[Path, str], path: Path, where: Path) -> list[tuple[int, float, float]]:
    trainer = open_trainer(0, _job(run[0], run[1], 6), where)[1]
    found = trainer.checkpointer.find_resume(path)
    assert found is not None
    trainer.restore(found)
    return _train(trainer)


def test_a_resharded_checkpoint_is_the_same_in_other_files(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "_CHUNK", 1000)  # boxes are cut
    source, target = run[0] / "checkpoints" / "step-00000004", tmp_path / "other" / "step-00000004"
    assert main(["checkpoint", "reshard", str(source), str(target), "--layout", "dp=3,sharding=ddp"]) == 0
    assert verify(target) == [] and listed_checkpoint(target).layout == "dp=3 ddp"
    assert {path.name.split("-")[1] for path in target.glob("*.safetensors")} == {"00000", "00001", "00002"}
    (mine, state), (whole, before) = read_full(target), read_full(source)
    assert mine.keys() == whole.keys() and all(torch.equal(mine[n], whole[n]) for n in whole)
    assert {**state, "layout": None} == {**before, "layout": None}
    assert _goes_on(run, target, tmp_path / "a") == _goes_on(run, source, tmp_path / "b"), "bit for bit"


def test_the_mean_of_checkpoints(run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_CHUNK", 1000)
    out = tmp_path / "mean"
    assert main(["checkpoint", "average", str(run[0]), "--out", str(out), "--weights", "1,3"]) == 0
    (first, _), (last, state) = (read_full(run[0] / "checkpoints" / f"step-0000000{step}") for step in (2, 4))
    mean, about = read_full(out)
    assert verify(out) == [] and set(mean) == {name for name in last if name.startswith("model/")}
    for name, value in mean.items():
        expected = 0.25 * first[name].double().numpy() + 0.75 * last[name].double().numpy()
        np.testing.assert_allclose(value.double().numpy(), expected, rtol=1e-14, atol=1e-17)
    assert "same" not in about and about["model"] == state["model"] and about["average"]["weights"] == [0.25, 0.75]
    with pytest.raises(UserError, match="holds weights and no run"):
        _goes_on(run, out, tmp_path / "resumed")
    kept = tmp_path / "kept"
    newest = run[0] / "checkpoints" / "step-00000004"
    assert main(["checkpoint", "average", str(newest), "--out", str(kept), "--keep-state"]) == 0
    assert _goes_on(run, kept, tmp_path / "a") == _goes_on(run, newest, tmp_path / "b"), "of one: itself"


def test_what_does_not_belong_together_is_refused(
    run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four, two = (str(run[0] / "checkpoints" / f"step-0000000{step}") for step in (4, 2))
    other = tmp_path / "other"
    other.mkdir()
    cfg = _job(other, "dense", 2)
    _train(open_trainer(0, replace(cfg, model=replace(cfg.model, ffn=128)), other)[1])
    out = str(tmp_path / "out")
    for argv, reason in (
        (["average", two, f"{other}/checkpoints", "--out", out], "model."),
        (["average", two, four, "--out", out, "--weights", "1"], "1 weights for 2 checkpoints"),
        (["average", two, four, "--out", out, "--weights", "1,-1"], "must be numbers from 0 on"),
        (["average", two, four, "--out", out, "--weights", "1,a"], "is not a list of numbers"),
        (["average", two, four, "--out", str(tmp_path)], "exists already"),
        (["reshard", two, out, "--layout", "dp"], "--layout: is 'dp'; give keys of parallel"),
        (["reshard", two, out, "--layout", "tp=3"], "tp"),
        (["reshard", two, out, "--layout", "tp=2,shading=zero1"], "shading"),
        (["reshard", two, out, "--layout", "dp=2,sharding=deepspeed"], "give sharding=zero1, which it loads too"),
        (["reshard", str(run[0]), out, "--layout", "dp=2"], "holds 2 checkpoints; name one"),
        (["reshard", two, str(tmp_path / "step-00000009"), "--layout", "dp=2"], "is the name of another step's"),
    ):
        assert main(["checkpoint", *argv]) == 2
        assert reason in capsys.readouterr().err
    state = json.loads((Path(two) / "state.json").read_text())
    assert state["step"] == 2 and not Path(out).exists()


def test_a_target_that_cannot_be_written_is_an_error_and_leaves_nothing(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rewrite.SummedFile, "write", full)
    source = run[0] / "checkpoints" / "step-00000002"
    assert main(["checkpoint", "reshard", str(source), str(tmp_path / "x"), "--layout", "dp=2"]) == 1
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
