"""A disk that is full costs a run nothing that it can do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pentad.parallel.record import files
from pentad.trainer.__main__ import main
from pentad.trainer.job import peaks, telling
from pentad.trainer.metrics.notices import or_without
from tests.jobs import DENSE
from tests.launch.test_bad_input import SMALL


def test_only_what_the_disk_refuses_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    with or_without("runs/x/curves.png"):
        raise OSError(28, "No space left on device")
    assert "runs/x/curves.png cannot be written (No space left on device)" in capsys.readouterr().err
    with pytest.raises(ValueError), or_without("anything"):
        raise ValueError


def test_a_run_on_a_disk_that_fills_up_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(telling, "draw_curves", full)
    monkeypatch.setattr(files, "collect", full)
    monkeypatch.setattr(peaks.MeasuredPeaks, "keep", full)
    places = [f"runs_dir={tmp_path}", "name=full", f"data.cache={tmp_path}/cache", "parallel.tp=1", "parallel.dp=1"]
    assert main([DENSE, *SMALL, *places, "train.steps=2", "checkpoint.final=false", "hardware.peak_tflops=null"]) == 0
    said = capsys.readouterr().err
    for part in ("curves.png", "record", "the measured peak"):
        assert f"{part} cannot be written" in said
