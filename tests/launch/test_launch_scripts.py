"""The scripts of examples/launch: a shell can read them, and what they start is what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pentad.configs import load

FOLDER = Path(__file__).parents[2] / "examples" / "launch"
SCRIPTS = sorted(file.name for file in FOLDER.glob("*.sh"))
STARTED = {
    "train.sh": "pentad train JOB train.steps=3",
    "torchrun.sh": "torchrun --standalone --nproc-per-node 2 -m pentad.trainer JOB train.steps=3",
    "torchrun_nodes.sh": "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-1:29500 "
    "--rdzv-id pentad --max-restarts 3 -m pentad.trainer JOB train.steps=3",
    "srun.sh": "srun --kill-on-bad-exit=1 python -m pentad.trainer JOB faults.stop_code=75 train.steps=3",
    "slurm.sh": "pentad slurm JOB --nodes 2 --gpus-per-node 8 --time 01:00:00 --submit --attach train.steps=3",
}


def test_the_job_of_the_scripts_is_valid_on_as_many_ranks_as_they_start() -> None:
    cfg = load(str(FOLDER / "job.yaml"), [])
    assert cfg.parallel.ranks == 2 and cfg.faults.recover and cfg.faults.spares == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_what_it_says(script: str, tmp_path: Path) -> None:
    for program in ("pentad", "torchrun", "srun"):
        stand_in = tmp_path / program
        stand_in.write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
        stand_in.chmod(0o755)
    nodes = {"NODES": "2", "HOST": "node-1"} | ({"GPUS": "8"} if script == "slurm.sh" else {})
    nodes |= {"RANKS": "8"} if script == "torchrun_nodes.sh" else {}
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **nodes}
    assert os.access(FOLDER / script, os.X_OK)
    command = [str(FOLDER / script), "JOB", "train.steps=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == STARTED[script]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_what_it_needs_says_so(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / script)]).returncode == 0
    if script in ("torchrun_nodes.sh", "slurm.sh", "srun.sh"):
        done = subprocess.run([str(FOLDER / script)], capture_output=True, text=True)
        assert done.returncode != 0 and "the job: a YAML file" in done.stderr
