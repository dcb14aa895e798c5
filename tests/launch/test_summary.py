"""The summary that `make demo` ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pentad.launch import summary


def _run_folder(folder: Path) -> Path:
    steps = [
        {"step": i, "loss": 5.0 - i / 10, "tokens": 100 * i, "tokens_per_s": 50.0 * i, "mfu": 0.1 * i}
        for i in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "events.jsonl").write_text(json.dumps({"event": "evaluation", "step": 4, "loss": 4.25}) + "\n")
    return folder


def test_summary_of_a_run(tmp_path: Path) -> None:
    first, held_out, speed, checkpoint = summary.summarize(_run_folder(tmp_path))
    assert first.endswith("5 steps, 500 tokens, loss 4.900 → 4.500")
    assert held_out == "held-out loss 4.250 after step 4"
    assert speed == "175 tokens/s, MFU 35.0% (medians)"  # of steps 2 to 5
    assert checkpoint == "no checkpoint"


def test_a_damaged_checkpoint_and_a_missing_run_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_run_folder(tmp_path) / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert summary.main([str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert summary.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
