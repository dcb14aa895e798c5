"""The benchmark of saves runs, saves what it says, and its parts are parts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import save_block

from pentad.trainer.checkpoint.checkpointer import verify
from pentad.trainer.checkpoint.names import checkpoints


def test_a_small_case_has_a_checkpoint_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HIDDEN", 64), ("FFN", 128), ("VOCAB", 320), ("LAYER_BYTES", 12 * (4 * 64**2 + 3 * 64 * 128))):
        monkeypatch.setattr(save_block, name, value)
    held, saves = save_block.measure(0, 0.001, 1, 2, tmp_path)
    assert 0.001 <= held < 0.0016 and len(saves) == 2
    assert all(0 < save.copy <= save.blocks and save.beyond == save.blocks - save.copy for save in saves)
    ((step, path),) = checkpoints(tmp_path / "checkpoints")
    assert step == 1 and verify(path) == []
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) >= 1e9 * held
