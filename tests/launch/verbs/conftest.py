"""A run that several tests of commands look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import DENSE

STEPS = 45
"""Of the run."""
JOB = [
    "parallel.tp=1", "parallel.dp=1", "parallel.pp=2", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=32",
    f"train.steps={STEPS}", "train.seq_len=16", "train.micro_batch=2", "train.global_batch=4", "model.hidden=32",
    "model.ffn=64", "eval.every=20", "eval.steps=1", "optim.schedule.warmup_steps=1", "checkpoint.final=false",
    "train.device=cpu", "hardware.peak_tflops=0.05", "log.every=20",
]  # fmt: skip


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two stages with experts, as the command line leaves it."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "pentad.launch.cli", "train", DENSE, *JOB, f"runs_dir={folder}"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report {folder}/demo/report.html" in done.stdout
    return folder / "demo"
