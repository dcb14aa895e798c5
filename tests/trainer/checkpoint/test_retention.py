"""Which checkpoints stay: against brute force, where removing fails, and where a run is taken back."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.parallel.global_tensor import GlobalTensor
from pentad.trainer.checkpoint import files
from pentad.trainer.checkpoint.manifest import FileSum, write_file, write_manifest
from pentad.trainer.checkpoint.names import checkpoints, step_folder
from pentad.trainer.checkpoint.retention import Retention, retain, superfluous
from tests.trainer.checkpoint.layouts import checkpointer


def _made(directory: Path, step: int, loss: float | None, finite: bool) -> Path:
    """A checkpoint without tensors."""
    path = step_folder(directory, step)
    path.mkdir(parents=True)
    sums: dict[str, FileSum] = {"tensors.json": write_file(path / "tensors.json", b'{"files": [], "tensors": {}}')}
    state: dict[str, Any] = {"step": step}
    if loss is not None:
        state["evaluation"] = {"step": step, "loss": loss}
    write_manifest(path, sums, state, [] if finite else ["model/a"])
    return path


def _expected(made: dict[int, tuple[float | None, bool]], newest: int, rules: Retention) -> set[int]:
    """Steps that stay, rule by rule."""
    if rules.newest == 0:
        return set(made)
    older = sorted(step for step in made if step <= newest)
    good = [step for step in older if made[step][1]]
    stay = {step for step in made if step > newest} | {newest}
    stay |= set(good[-rules.newest :]) | set([step for step in older if not made[step][1]][-rules.newest :])
    stay |= {step for step in good if rules.every and not step % rules.every}
    losses = sorted((loss, -step) for step in good if (loss := made[step][0]) is not None)
    return stay | {-step for _, step in losses[: rules.best]}


@pytest.mark.parametrize("seed", range(12))
def test_what_stays_is_what_the_rules_say(tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    steps = draws.sample(range(1, 40), 9)
    made = {step: (draws.choice([None, 1.5, 2.0, draws.random()]), draws.random() > 0.2) for step in steps}
    for step, (loss, finite) in made.items():
        _made(tmp_path, step, loss, finite)
    damaged = draws.choice(steps)
    (step_folder(tmp_path, damaged) / "manifest.json").write_text("{}")
    usable = {step: about for step, about in made.items() if step != damaged}
    rules = Retention(draws.randint(0, 3), draws.choice([0, 2, 5]), draws.randint(0, 2))
    newest = draws.choice(list(usable))
    assert retain(tmp_path, step_folder(tmp_path, newest), rules) == []
    assert {step for step, _ in checkpoints(tmp_path)} == _expected(usable, newest, rules) | {damaged}


def _changed_loss(path: Path) -> None:
    """Another loss in a state that the manifest does not vouch for."""
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("9.0", "0.1"))
    assert zlib.crc32(text.encode()) != zlib.crc32((path / "state.json").read_bytes())


def test_the_best_is_chosen_by_states_that_are_as_they_were_written(tmp_path: Path) -> None:
    paths = [_made(tmp_path, step, loss, True) for step, loss in ((1, 2.0), (2, 9.0), (3, 3.0), (4, 3.0), (5, 7.0))]
    _changed_loss(paths[1])
    assert superfluous(tmp_path, paths[4], Retention(1, 0, 1)) == [paths[3], paths[2], paths[1]]
    assert superfluous(tmp_path, paths[4], Retention(1, 0, 2)) == [paths[2], paths[1]], "of equal ones the later"
    assert json.loads((paths[0] / "manifest.json").read_text())["step"] == 1


def _save(saver: Any, steps: Iterator[int] | list[int]) -> None:
    for step in steps:
        state = {"evaluation": {"step": step, "loss": abs(step - 4) + 1.0}}
        saver.save(step, {"model/a": GlobalTensor.of(torch.full((3,), float(step)))}, state)
        saver.wait()


def test_a_run_that_is_taken_back_keeps_what_the_rules_say_at_every_save(tmp_path: Path) -> None:
    rules = Retention(1, 5, 1)
    _save(checkpointer(tmp_path, keep=rules), list(range(1, 10)))
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 5, 4]
    again = checkpointer(tmp_path, keep=rules)
    for start in (5, 4, 10):  # from any of them
        target = {"model/a": GlobalTensor.of(torch.zeros(3))}
        assert again.find_resume(step_folder(tmp_path, start)) is not None
        again.load(step_folder(tmp_path, start), target)
        assert target["model/a"].local.tolist() == [start] * 3
        _save(again, list(range(start + 1, 12)))
        assert [step for step, _ in checkpoints(tmp_path)] == [11, 10, 5, 4]


def test_what_cannot_be_removed_is_said_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[dict[str, Any]] = []
    saver = checkpointer(tmp_path, keep=1, on_event=events.append)
    _save(saver, [1])
    true_unlink = os.unlink

    def busy(path: Any, *args: Any, **kwargs: Any) -> None:
        if "safetensors" in str(path):
            raise OSError(16, "Device or resource busy", str(path))
        true_unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "unlink", busy)
        _save(saver, [2])
    assert [event["event"] for event in events] == ["checkpoint_saved", "checkpoint_saved", "checkpoint_not_removed"]
    assert "step-00000001 ([Errno 16] Device or resource busy" in events[-1]["reason"]
    assert "could not be removed: " in capsys.readouterr().err
    assert saver.find_resume("latest") == step_folder(tmp_path, 2) and saver.newest == 2
    _save(saver, [3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003"], "the next save removes it"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert retain(tmp_path, step_folder(tmp_path, 3), Retention(1)) == []
