"""The benchmark of one GPU, in small on a CPU: parts in processes of their own, results that are kept, the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from gpu_parts import Settings


def test_parts_find_what_they_should_on_a_cpu(tmp_path: Path) -> None:
    settings = Settings("cpu", tmp_path, 2)
    for part in ("path", "curves", "kernels", "ceiling"):
        gpu.run_part(settings, part)
    curves = json.loads(gpu.file_of(tmp_path, "curves").read_text())
    assert len(curves) == 4 and all(each["right"] for each in curves.values())
    assert min(json.loads(gpu.file_of(tmp_path, "ceiling").read_text()).values()) > 0


def test_a_training_is_a_process_and_its_result_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--out", str(tmp_path), "--steps", "2", "--only", "train 8 experts, top 2"]
    assert gpu.main(given) == 0
    result = gpu.file_of(tmp_path, "train 8 experts, top 2")
    found = json.loads(result.read_text())
    assert found["tokens_per_s"] > 0 and sum(found["waterfall"].values()) > 0.9
    assert "| 8 experts, top 2 | " in capsys.readouterr().out
    kept = result.stat().st_mtime_ns
    assert gpu.main(given) == 0 and result.stat().st_mtime_ns == kept


def test_a_part_that_goes_wrong_or_takes_too_long_is_told(tmp_path: Path) -> None:
    settings = Settings("cuda", tmp_path)  # which is not here
    assert "took more than 0 s" in gpu.run_all(settings, ["kernels"], seconds=0.01)["kernels"]
    assert gpu.table(tmp_path)[-1] == "| 8 experts, top 2 | – | – | – | – | – |"
