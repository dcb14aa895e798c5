"""The summary and the picture that a run ends with."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest

from pentad.configs.errors import UserError
from pentad.trainer.metrics.curves import _smooth, draw_curves
from pentad.trainer.metrics.summary import lines_of, summarize


def _run_folder(folder: Path, **changed: object) -> Path:
    steps = [
        {"step": i, "loss": 5.0 - i / 10, "lr": 1e-3, "tokens": 100 * i, "tokens_per_s": 50.0 * i, "mfu": 0.1 * i}
        | {"step_time_s": 30.0, "skipped": 0}
        for i in range(1, 6)
    ]
    steps[-1] |= changed
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    events = [{"event": "evaluation", "step": step, "loss": loss} for step, loss in ((2, 4.125), (4, 4.25))]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_summary_of_a_run(tmp_path: Path) -> None:
    first, held_out, speed, checkpoint = summarize(_run_folder(tmp_path))
    assert first.endswith("5 steps in 2m30s, 500 tokens, loss 4.900 → 4.500")
    assert held_out == "held-out loss 4.250 after step 4, lowest 4.125 after step 2"
    assert speed == "175 tokens/s, MFU 35.0% (medians)"  # of steps 2 to 5
    assert checkpoint == "no checkpoint"


def test_what_went_wrong_is_in_the_summary(tmp_path: Path) -> None:
    first, skipped, *_ = summarize(_run_folder(tmp_path, loss=None, skipped=3))
    assert first.endswith("loss 4.900 → not finite")
    assert skipped == "3 steps skipped for a gradient that was not finite"


def test_a_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no steps"):
        summarize(tmp_path / "nowhere")


def test_half_written_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo\n[3]\n{"step": 4}\n')
    assert lines_of(file) == [{"step": 1}, {"step": 4}]


def test_curves_are_drawn_into_the_run_folder(tmp_path: Path) -> None:
    picture = draw_curves(_run_folder(tmp_path, loss=None, mfu=None))
    assert picture is not None and picture == tmp_path / "curves.png"
    pixels = matplotlib.image.imread(picture)[..., :3]
    colors = {tuple(row) for row in (pixels.reshape(-1, 3) * 255).round().astype(int).tolist()}
    # Loss, held-out loss and MFU, each in its colour.
    assert {(0x25, 0x63, 0xEB), (0xDC, 0x26, 0x26), (0x05, 0x96, 0x69)} <= colors


def test_one_step_is_no_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert draw_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_is_the_mean_of_finite_neighbours() -> None:
    nan = float("nan")
    assert _smooth([1.0, 2.0, nan, 6.0, nan, nan, nan], 1)[:5].tolist() == [1.5, 1.5, 4.0, 6.0, 6.0]
    assert str(_smooth([1.0, 2.0, nan, 6.0, nan, nan, nan], 1)[5]) == "nan"
