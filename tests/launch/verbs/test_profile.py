"""`pentad profile`: a job's steps by module, with its whole layout; the rows sum to the step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pentad.launch.cli import main
from pentad.launch.verbs.profile import _rows
from pentad.models.costs.flops import flops_per_step
from tests.launch.verbs.conftest import STEPS
from tests.training import job

JOB = """
name: small
model: {family: llama, layers: 2, hidden: 64, heads: 2, kv_heads: 2, ffn: 128, vocab: 320}
parallel: {tp: 2, pp: 2}
train: {steps: 70, global_batch: 4, micro_batch: 2, seq_len: 64, dtype: fp32}
optim: {name: adamw, lr: 1.0e-3}
data: {name: stdlib}
hardware: {peak_tflops: 0.05}
"""


@pytest.mark.slow
def test_the_rows_of_a_job_sum_to_its_step(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    code = "import sys; from pentad.launch.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "profile", "job.yaml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["what"]: row for row in found["rows"]}
    assert sum(row["seconds"] for row in found["rows"]) == pytest.approx(found["step_s"], rel=0.05)
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    for name in (
        "forward attention",
        "backward ffn",
        "forward head",
        "optimizer",
        "reduce_scatter tp",
        "receive channel",
    ):
        assert rows[name]["seconds"] > 0, sorted(rows)
    assert rows["forward ffn"]["bound"] in ("compute", "memory") and 0 < rows["forward ffn"]["of_roofline"] < 1
    assert found["memory_gb_s"] > 0.5 and not (tmp_path / "runs").exists()


@pytest.mark.distributed
def test_a_run_is_read_from_its_own_record(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(small_run.rglob("*"))
    assert main(["profile", str(small_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in found["rows"]}
    assert found["by"] == "operation" and len(found["steps"]) == 20
    assert found["steps"][-1] == STEPS and not {21, 41} & {*found["steps"]}, "an evaluation lies in these"
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(found["step_s"], rel=0.05)
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    own = [line["step_time_s"] for line in lines if line["step"] in found["steps"]]
    assert found["recorded_s"] == pytest.approx(sum(own) / len(own), rel=0.05)
    for name in ("forward stage 0", "forward stage 1", "backward stage 0", "backward stage 1", "optimizer", "data"):
        assert rows[name]["seconds"] > 0, sorted(rows)
    assert any(name.startswith("receive") for name in rows)
    assert main(["profile", str(small_run)]) == 0
    assert "by operation: its modules were not recorded" in capsys.readouterr().out
    assert sorted(small_run.rglob("*")) == before, "nothing is written"


@pytest.mark.distributed
def test_what_a_record_cannot_tell_is_refused(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(small_run), "train.steps=3"]) == 2
    assert "changes nothing of a run that has been; give" in capsys.readouterr().err
    assert main(["profile", str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy, ignore=shutil.ignore_patterns("*.ring"))
    assert main(["profile", str(copy)]) == 2
    assert "its record cannot be read" in capsys.readouterr().err


def test_whole_passes_are_held_against_the_roofline() -> None:
    cfg = job(dp=2)
    tokens, pairs = 8 * 16, 8 * 16**2 / 2
    seconds = {"forward": 1.0, "backward": 2.0, "other": 0.5}
    rows = {row["what"]: row for row in _rows(cfg, seconds, 1.0, 1e9)}
    flops = 1e12 * (rows["forward"]["tflops"] + 2 * rows["backward"]["tflops"])
    assert flops == pytest.approx(flops_per_step(cfg.model, tokens, pairs) / 2)
    assert rows["forward"]["bound"] in ("compute", "memory") and "bound" not in rows["other"]
    split = {row["what"]: row for row in _rows(cfg, seconds | {"backward weights": 1.0}, 1.0, 1e9)}
    assert "bound" in split["forward"] and "bound" not in split["backward"]
