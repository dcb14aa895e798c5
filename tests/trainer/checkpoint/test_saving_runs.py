"""Saves of a run: when they are due, when they fail, when there is nothing worth saving."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.schema import CheckpointConfig, Config, FaultsConfig
from pentad.trainer.checkpoint import io
from pentad.trainer.checkpoint import manifest as checkpoint_manifest
from pentad.trainer.checkpoint.checkpointer import CheckpointError, verify
from pentad.trainer.checkpoint.names import checkpoints
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.metrics.metric import Alert
from pentad.trainer.metrics.report import Report
from pentad.trainer.numerics.bad_steps import DivergedError
from pentad.trainer.processes.signals import StopRequest
from pentad.trainer.trainer import Trainer
from tests.trainer.checkpoint.test_resume import Curve, text_job
from tests.training import open_trainer


def _trainer(cfg: Config, folder: Path, curve: Curve) -> Trainer:
    return open_trainer(0, cfg, folder.parent, keep=1, asynchronous=True, on_event=curve.events.append)[1]


def _cfg(folder: Path, *, steps: int = 4, final: bool = True) -> Config:
    cfg = text_job(folder)
    train = replace(cfg.train, steps=steps, global_batch=2)
    faults = FaultsConfig(timeout_s=60, max_bad_steps=3)
    return replace(cfg, train=train, checkpoint=CheckpointConfig(every=2, final=final), faults=faults)


def _train(trainer: Trainer, curve: Curve) -> bool:
    return trainer.train(Outputs(curve, curve), StopRequest())  # type: ignore[arg-type]


def _steps(curve: Curve, event: str) -> list[int]:
    return [e["step"] for e in curve.events if e["event"] == event]


@pytest.mark.parametrize(("steps", "final", "due"), [(4, False, [2, 4]), (3, True, [2, 3])])
def test_every_save_that_is_due_is_made_also_after_the_last_step(
    tmp_path: Path, steps: int, final: bool, due: list[int]
) -> None:
    curve = Curve()
    assert _train(_trainer(_cfg(tmp_path, steps=steps, final=final), tmp_path / "checkpoints", curve), curve)
    assert _steps(curve, "checkpoint_saved") == due
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == due[-1:]


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, curve = io.write_files, Curve()

    def full(folder: Path, *args: Any) -> Any:
        if "00000002" in folder.name:
            raise OSError(28, "No space left on device")
        return write(folder, *args)

    monkeypatch.setattr(io, "write_files", full)
    assert _train(_trainer(_cfg(tmp_path), tmp_path / "checkpoints", curve), curve)
    assert _steps(curve, "checkpoint_failed") == [2] and _steps(curve, "checkpoint_saved") == [4]
    assert [row[0] for row in curve.rows] == [1, 2, 3, 4]


def test_a_last_save_that_fails_is_an_error_after_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "write_files", full)
    for final in (True, False):
        curve = Curve()
        with pytest.raises(CheckpointError, match=r"came to step 4, and its last save failed: .*No space left"):
            _train(_trainer(_cfg(tmp_path, final=final), tmp_path / "checkpoints", curve), curve)
        assert _steps(curve, "checkpoint_failed") == [2, 4]
        assert [row[0] for row in curve.rows] == [1, 2, 3, 4]


class _Alerted(Curve):
    """Remembers alerts too, and opens a gate when a step is reported."""

    def __init__(self, gate: threading.Event, at: int) -> None:
        super().__init__()
        self.alerts: list[Alert] = []
        self._gate, self._at = gate, at

    def log(self, found: Report | str, **fields: Any) -> None:
        super().log(found, **fields)
        if isinstance(found, Report) and found.step == self._at:
            self._gate.set()

    def add(self, report: Report) -> None:
        self.alerts += report.alerts


def test_a_storage_that_hangs_costs_the_saves_that_come_meanwhile_and_not_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, gate = io.write_files, threading.Event()
    curve = _Alerted(gate, 7)

    def hung(*args: Any) -> Any:
        assert gate.wait(60)
        return write(*args)

    monkeypatch.setattr(io, "write_files", hung)
    assert _train(_trainer(_cfg(tmp_path, steps=8), tmp_path / "checkpoints", curve), curve)
    assert [row[0] for row in curve.rows] == list(range(1, 9))
    assert _steps(curve, "checkpoint_skipped") == [4, 6] and _steps(curve, "checkpoint_saved") == [2, 8]
    said = [line for line in capsys.readouterr().err.splitlines() if "is not saved" in line]
    assert len(said) == 2 and "step 4 is not saved: the save of step 2 is still being written, for " in said[0]
    assert [(alert.title, alert.event) for alert in curve.alerts] == [
        ("checkpoint of step 4", "checkpoint_skipped"),
        ("checkpoint of step 6", "checkpoint_skipped"),
    ]


@pytest.mark.parametrize(
    ("number", "words"), [(28, "No space left"), (30, "Read-only"), (13, "Permission denied"), (5, "Input/output")]
)
def test_no_storage_that_refuses_stops_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """At the first folder, at a write or at the rename: nothing is left behind, and every step is done."""
    for place in ("mkdir", "write", "rename"):
        curve, folder = _Alerted(threading.Event(), 9), tmp_path / place
        folder.mkdir()
        trainer = _trainer(_cfg(folder), folder / "checkpoints", curve)

        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            if place == "mkdir":
                patch.setattr(Path, "mkdir", refuse)
            elif place == "write":
                patch.setattr(checkpoint_manifest.SummedFile, "write", refuse)
            else:
                patch.setattr(os, "rename", refuse)
            with pytest.raises(CheckpointError, match=words):
                _train(trainer, curve)
        assert [row[0] for row in curve.rows] == [1, 2, 3, 4]
        assert _steps(curve, "checkpoint_failed") == [2, 4] and len(curve.alerts) == 2 and words in curve.alerts[0].text
        left = folder / "checkpoints"
        assert not left.exists() or not list(left.iterdir())


class _Acting(_Alerted):
    """Does something when a step is reported."""

    def __init__(self, acts: dict[int, Callable[[], object]]) -> None:
        super().__init__(threading.Event(), 0)
        self._acts = acts

    def log(self, found: Report | str, **fields: Any) -> None:
        super().log(found, **fields)
        if isinstance(found, Report) and found.step in self._acts:
            self._acts[found.step]()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _mounted(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


@pytest.mark.parametrize("words", ["No space left", "Read-only"])
def test_a_disk_that_is_really_full_or_read_only_for_a_while_costs_the_saves_meanwhile(
    tmp_path: Path, small_disk: Path, words: str
) -> None:
    filler = small_disk / "filler"

    def fill() -> None:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    acts: dict[int, Callable[[], object]] = {3: fill, 5: filler.unlink}
    if words == "Read-only":
        acts = {3: lambda: _mounted(small_disk, "ro"), 5: lambda: _mounted(small_disk, "rw")}
    curve = _Acting(acts)
    cfg = replace(_cfg(tmp_path, steps=8), checkpoint=CheckpointConfig(every=2, asynchronous=False))
    trainer = open_trainer(0, cfg, small_disk, keep=1, on_event=curve.events.append)[1]
    assert _train(trainer, curve)
    assert [row[0] for row in curve.rows] == list(range(1, 9))
    assert _steps(curve, "checkpoint_saved") == [2, 6, 8] and _steps(curve, "checkpoint_failed") == [4]
    assert words in next(e["reason"] for e in curve.events if e["event"] == "checkpoint_failed")
    assert [alert.title for alert in curve.alerts] == ["checkpoint of step 4"]
    assert [path.name for _, path in checkpoints(small_disk / "checkpoints")] == ["step-00000008"]
    assert verify(small_disk / "checkpoints" / "step-00000008") == []


def test_files_that_may_not_grow_cost_the_saves_meanwhile(tmp_path: Path) -> None:
    """The kernel refuses writes beyond a limit, as at a quota; anybody may set that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    curve = _Acting(
        {
            3: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1])),
            5: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        }
    )
    cfg = replace(_cfg(tmp_path, steps=6), checkpoint=CheckpointConfig(every=2, asynchronous=False))
    try:
        assert _train(open_trainer(0, cfg, tmp_path, keep=1, on_event=curve.events.append)[1], curve)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _steps(curve, "checkpoint_saved") == [2, 6] and _steps(curve, "checkpoint_failed") == [4]
    assert "File too large" in next(e["reason"] for e in curve.events if e["event"] == "checkpoint_failed")


def test_a_run_with_nan_in_its_parameters_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    curve = Curve()
    _train(_trainer(_cfg(tmp_path, steps=2), tmp_path / "checkpoints", curve), curve)
    good = tmp_path / "checkpoints" / "step-00000002"
    trainer = _trainer(_cfg(tmp_path, steps=9), tmp_path / "checkpoints", curve)
    trainer.restore(good)
    with torch.no_grad():
        for param in trainer.parts.model.layers.parameters():
            param.view(-1)[0] = float("nan")
    curve.events.clear()
    with pytest.raises(
        DivergedError, match=r"3 steps in a row .* it began in step 3: NaN in the parameter layers\.0\."
    ):
        _train(trainer, curve)
    assert _steps(curve, "non_finite") == [3]
    trainer.checkpointer.close()
    assert _steps(curve, "checkpoint_saved") == [4]
    assert good in [path for _, path in checkpoints(tmp_path / "checkpoints")] and verify(good) == []
    assert _trainer(_cfg(tmp_path), tmp_path / "checkpoints", curve).checkpointer.find_resume("latest") == good
