"""`pentad schedule RUN`: the program of a run, planned and real, after a short job with a pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pentad.launch.cli import main
from tests.jobs import DENSE

JOB = [
    "log.memory=true",
    "parallel.tp=1",
    "parallel.dp=1",
    "parallel.pp=2",
    "parallel.pipeline.chunks=2",
    "parallel.pipeline.vocab=balanced",
]
SIZES = ["train.steps=3", "train.seq_len=32", "train.micro_batch=2", "model.hidden=64", "model.ffn=64", "eval.every=3"]
SHORT = ["optim.schedule.warmup_steps=1", "checkpoint.final=false", "train.device=cpu", "eval.steps=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "pentad.launch.cli", "train", DENSE, *JOB, *SIZES, *SHORT, f"runs_dir={folder}"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "demo"


@pytest.mark.distributed
def test_a_step_planned_and_real(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    assert main(["schedule", str(run), "--step", "2", "--json", "--svg", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["microbatches"], found["chunks"], found["vocab"]) == (2, 4, 2, "balanced")
    hashes = [json.loads(line).get("program") for line in (run / "events.jsonl").read_text().splitlines()]
    assert found["hash"] in hashes
    # The plan is made of the step's own medians without latency, so it cannot be far from the work that was done.
    for planned, real in zip(found["work"], found["actual"]["work"], strict=True):
        assert planned == pytest.approx(real, rel=0.5)
    drawn = picture.read_text()
    assert "actual" in drawn and "held on the device (MiB); filled: plan, line: real" in drawn


@pytest.mark.distributed
def test_the_last_step_by_default_and_one_that_is_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", str(run)]) == 0
    assert "real step" in capsys.readouterr().out
    assert main(["schedule", str(run), "--step", "9"]) == 2
    error = capsys.readouterr().err
    assert "--step: step 9 is not whole in the record" in error and "its last whole step is 3" in error
