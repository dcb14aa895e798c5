"""`pentad slurm`: what is written, what SLURM is asked, and what is refused; with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pentad.configs import load
from pentad.launch.cli import main
from pentad.launch.verbs import slurm
from tests.jobs import DENSE
from tests.launch.slurm.cluster import StandInCluster

_JOB = ["slurm", DENSE, "name=a", "parallel.tp=1", "parallel.dp=2", "train.global_batch=2", "train.micro_batch=1"]
_SHAPE = ["--nodes", "2", "--ranks-per-node", "1"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInCluster:
    """Of a user who stands in an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = StandInCluster(tmp_path / "cluster", "sbatch", "squeue", "scancel")
    monkeypatch.setenv("PATH", found.path)
    found.answers("sbatch", "echo '12;cluster'")
    found.answers("squeue", "echo 'RUNNING|None'")
    return found


def test_a_written_job_holds_all_that_it_needs(cluster: StandInCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_JOB, *_SHAPE]) == 0
    folder = Path("runs/a/slurm/0001").resolve()
    assert str(folder / "job.sbatch") in capsys.readouterr().out and not cluster.calls
    given = load(str(folder / "job.yaml"), world_size=2)
    assert given == load(DENSE, _JOB[2:], world_size=2)
    assert "faults.stop_code=75" in (text := (folder / "job.sbatch").read_text()) and "checkpoint.resume=latest" in text
    # The copy is what a rank of the job imports, not what is installed.
    code = "import pentad.trainer.preflight as m, pentad.launch.slurm.script; print(m.__file__)"
    env = {**os.environ, "PYTHONPATH": str(folder / "code")}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(folder / "code")
    assert main([*_JOB, *_SHAPE]) == 0 and Path("runs/a/slurm/0002/job.sbatch").exists()


def test_a_job_is_submitted_followed_and_ended(
    cluster: StandInCluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_ASK_S", 0.0)
    assert main([*_JOB, *_SHAPE, "--submit"]) == 0
    folder = Path("runs/a/slurm/0001")
    assert cluster.calls == [f"sbatch --parsable {folder.resolve()}/job.sbatch"]
    assert "job 12: " in capfd.readouterr().out

    assert main([*_JOB, *_SHAPE, "--submit"]) == 2  # a second one of the same run
    assert "job 12 of this run is RUNNING" in capfd.readouterr().err

    (folder / "rank-0.log").write_text("step 1\n")
    more = f"echo step 2 >> {folder}/rank-0.log; echo 'RUNNING|None'"
    cluster.answers("squeue", "echo 'PENDING|Priority'", "echo 'RUNNING|None'", more, "echo 'COMPLETED|None'")
    assert main([*_JOB, "--attach"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert [line for line in said if line.startswith(("job 12", "step"))] == [
        "job 12: PENDING (Priority)", "step 1", "job 12: RUNNING", "step 2", "job 12: COMPLETED",
    ]  # fmt: skip

    cluster.answers("squeue", "echo 'FAILED|NonZeroExitCode'")
    assert main([*_JOB, "--attach"]) == 1


def test_a_running_job_is_told_to_save_and_only_then_ended(cluster: StandInCluster) -> None:
    assert main([*_JOB, *_SHAPE, "--submit"]) == 0
    assert main([*_JOB, "--cancel"]) == 0
    assert Path("runs/a/slurm/0001/cancelled").exists()  # so that the script does not bring it back
    assert main([*_JOB, "--cancel"]) == 0
    assert [call for call in cluster.calls if call.startswith("scancel")] == ["scancel --signal=USR1 12", "scancel 12"]


def test_a_waiting_job_is_taken_out(cluster: StandInCluster) -> None:
    assert main([*_JOB, *_SHAPE, "--submit"]) == 0
    cluster.answers("squeue", "echo 'PENDING|Resources'")
    assert main([*_JOB, "--cancel"]) == 0
    assert cluster.calls[-1] == "scancel 12"


def test_a_job_that_slurm_has_forgotten_is_over(cluster: StandInCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_JOB, *_SHAPE, "--submit"]) == 0
    cluster.answers("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert main([*_JOB, "--cancel"]) == 0
    assert "job 12 is over" in capsys.readouterr().out
    assert main([*_JOB, *_SHAPE, "--submit"]) == 0  # the next one


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--nodes: is not given"),
        (["--nodes", "2"], "--ranks-per-node"),
        (["--nodes", "3", "--ranks-per-node", "1"], "3"),
        (["--attach"], "no job of runs/a"),
        (["--cancel"], "no job of runs/a"),
        (["--cancel", "--submit"], "--cancel: does not go with --submit"),
        ([*_SHAPE, "model.hiden=3"], "hidden"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    cluster: StandInCluster, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main([*_JOB, *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not cluster.calls and not Path("runs").exists()


def test_what_slurm_says_is_passed_on(
    cluster: StandInCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.answers("sbatch", "echo 'sbatch: error: invalid partition: fast' >&2; exit 1")
    assert main([*_JOB, *_SHAPE, "--partition", "fast", "--submit"]) == 2
    assert "sbatch: sbatch: error: invalid partition: fast" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*_JOB, *_SHAPE, "--submit"]) == 2
    assert "sbatch is not there" in capsys.readouterr().err
