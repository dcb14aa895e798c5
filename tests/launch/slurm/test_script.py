"""The batch script: what it asks for, and what it makes of how the ranks end, with stand-ins for SLURM's commands."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pentad.configs import UserError
from pentad.launch.slurm.request import SlurmRequest
from pentad.launch.slurm.script import CANCELLED, FAULTS, STOP_CODE, ScriptFacts, batch_script
from tests.launch.slurm.cluster import StandInCluster

_REQUEST = SlurmRequest(nodes=4, gpus_per_node=8)


def _facts(folder: Path) -> ScriptFacts:
    return ScriptFacts(
        name="job",
        folder=folder / 'it\'s 100% "here"',
        run=folder / "run",
        checkpoints=folder / "run" / "checkpoints",
        work=folder,
        python="python3",
        options=["--import", "own.module"],
        overrides=["checkpoint.resume=latest"],
        command="pentad slurm job.yaml\n--nodes 4",
    )


def test_what_is_asked_for_stands_in_the_options() -> None:
    request = replace(
        _REQUEST,
        ranks_per_node=4,
        cpus_per_rank=12,
        time="1-00:00:00",
        partition="gpu",
        account="us",
        qos="high",
        notice=60,
        setup=("module load cuda",),
        sbatch=("--constraint=h200",),
    )
    text = batch_script(request, _facts(Path("/shared")))
    options = [shlex.split(line, comments=False)[1][2:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "job-name=job",
        "nodes=4",
        "ntasks-per-node=4",
        "gpus-per-node=8",
        "cpus-per-task=12",
        "time=1-00:00:00",
        "partition=gpu",
        "account=us",
        "qos=high",
        "chdir=/shared",
        'output=/shared/it\'s 100%% "here"/job.log',
        "open-mode=append",
        "signal=USR1@60",
        "requeue",
        "constraint=h200",
    ]
    assert "\nmodule load cuda\n" in text and "OMP_NUM_THREADS:-12" in text
    assert "\n# Written by: pentad slurm job.yaml --nodes 4\n" in text  # in one line, whatever it holds
    assert "--import own.module" in text


def test_without_gpus_and_notice_none_are_asked_for() -> None:
    text = batch_script(SlurmRequest(nodes=1, ranks_per_node=2, notice=0), _facts(Path("/shared")))
    assert "gpus" not in text and "--signal" not in text and "SRUN_CPUS" not in text


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("pentad.sif", "apptainer exec --nv --bind=/shared '--bind=/shared/it'"),
        ("nvcr.io#nvidia/pytorch:26.10-py3", "'--container-image=nvcr.io#nvidia/pytorch:26.10-py3'"),
    ],
)
def test_ranks_and_check_run_in_the_container(image: str, expected: str) -> None:
    text = batch_script(replace(_REQUEST, container=image), _facts(Path("/shared")))
    assert text.count(expected) == 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"nodes": 0}, "--nodes: 0: at least 1"),
        ({"gpus_per_node": 0}, "--ranks-per-node"),
        ({"time": "soon"}, "--time"),
        ({"sbatch": ("mem=0",)}, "--sbatch"),
        ({"sbatch": ("--mem=0\n#SBATCH --uid=0",)}, "--sbatch"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        replace(_REQUEST, **fields)  # type: ignore[arg-type]


class _Job:
    """A script in a folder, and stand-ins for srun and scontrol."""

    def __init__(self, folder: Path, *, recovers: bool = False) -> None:
        self.facts = replace(_facts(folder), recovers=recovers)
        self.facts.folder.mkdir(parents=True)
        self.facts.checkpoints.mkdir(parents=True)
        self.cluster = StandInCluster(folder / "cluster", "srun", "scontrol", "sleep", *(["sinfo"] if recovers else []))
        self.script = folder / "job.sbatch"
        self.script.write_text(batch_script(_REQUEST, self.facts))
        assert subprocess.run(["bash", "-n", str(self.script)], check=False).returncode == 0

    def run(self, *ranks: str) -> tuple[int, str, list[str]]:
        """Exit code, output, and the commands called after the look at the nodes, of a script whose ranks do that."""
        self.cluster.answers("srun", "exit 0", *ranks)
        before = len(self.cluster.calls)
        env = {"PATH": self.cluster.path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-3]"}
        done = subprocess.run(
            ["bash", str(self.script)], env=env, capture_output=True, text=True, check=False, timeout=60
        )
        calls = self.cluster.calls[before:]
        assert calls[0].startswith("srun ") and "pentad.launch.slurm.environment" in calls[0]
        return done.returncode, done.stdout + done.stderr, [call.split()[0] for call in calls[1:]]


@pytest.fixture
def job(tmp_path: Path) -> _Job:
    return _Job(tmp_path)


def test_a_job_that_is_done_is_over(job: _Job) -> None:
    code, said, calls = job.run("exit 0")
    assert (code, calls) == (0, ["srun"]) and "done" in said


def test_ranks_that_were_told_to_leave_bring_the_job_back_into_the_queue(job: _Job) -> None:
    (job.facts.checkpoints / "step-00000033").mkdir()
    code, said, calls = job.run(f"exit {STOP_CODE}")
    assert (code, calls) == (1, ["srun", "scontrol", "sleep"])  # SLURM ends it while it sleeps
    assert "back into the queue: stopped and saved, newest checkpoint step-00000033" in said
    assert job.cluster.calls[2] == "scontrol requeue 7"


def test_a_mistake_of_the_users_is_not_tried_again(job: _Job) -> None:
    code, said, calls = job.run("exit 2")
    assert (code, calls) == (2, ["srun"]) and "mistake" in said


def test_a_node_that_is_not_as_it_must_be_is_no_place_to_start(job: _Job) -> None:
    job.cluster.answers("srun", "exit 2")
    env = {"PATH": job.cluster.path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0"}
    done = subprocess.run(["bash", str(job.script)], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and len(job.cluster.calls) == 1


def test_faults_are_tried_again_as_long_as_there_is_progress(job: _Job) -> None:
    at = job.facts.checkpoints
    saves = [f"mkdir '{at}/step-0000000{n}'; exit 1" for n in range(1, 6)]
    code, said, calls = job.run(*saves, "exit 0")
    assert (code, calls) == (0, ["srun"] * 6)
    assert said.count("again on the same nodes") == 5


def test_without_progress_other_nodes_are_tried_and_then_none(job: _Job) -> None:
    code, said, calls = job.run("exit 137")
    assert (code, calls) == (1, ["srun", "srun", "scontrol", "sleep"]) and "perhaps to better nodes" in said
    assert (job.facts.folder / FAULTS).read_text() == "2 none\n"
    code, said, calls = job.run("exit 137")  # SLURM has started it anew
    assert code == 137 and calls[-1] == "srun" and "no progress in 3 starts: over" in said


def test_a_cancelled_job_does_not_come_back(job: _Job) -> None:
    code, said, calls = job.run(f'touch "${{PYTHONPATH%%/code*}}/{CANCELLED}"; exit {STOP_CODE}')
    assert (code, calls) == (0, ["srun"]) and "cancelled, and saved" in said
    code, said, calls = job.run("exit 1")
    assert (code, calls) == (0, []) and "cancelled" in said


def test_the_script_outlives_the_notice_and_hears_how_the_ranks_end(job: _Job) -> None:
    """The signal comes while srun runs: the script goes on waiting, and takes srun's own code."""
    code, _, calls = job.run(f"kill -USR1 $PPID; kill -TERM $PPID; /bin/sleep 0.2; exit {STOP_CODE}")
    assert (code, calls) == (1, ["srun", "scontrol", "sleep"])


def _event(kind: str) -> str:
    """What a rank does to say that."""
    return f"""echo '{{"time": 1, "event": "{kind}", "step": 3}}' >> "$(dirname "$0")/../../run/events.jsonl" """


def test_a_job_that_went_on_without_a_node_has_ended_as_its_events_say(tmp_path: Path) -> None:
    job = _Job(tmp_path, recovers=True)
    text = job.script.read_text()
    assert "\n#SBATCH --no-kill\n" in text and " --no-kill --open-mode" in text
    code, said, calls = job.run(f"{_event('fault')}; {_event('end')}; exit 137")
    assert (code, calls) == (0, ["srun"]) and "went on without ranks that were lost (exit code 137)" in said
    code, said, calls = job.run(f"{_event('stopped')}; exit 137")
    assert (code, calls) == (1, ["srun", "scontrol", "sleep"]) and "stopped and saved" in said


def test_a_fault_that_was_not_mended_is_none_the_less_one(tmp_path: Path) -> None:
    job = _Job(tmp_path, recovers=True)
    (job.facts.run / "events.jsonl").write_text('{"time": 1, "event": "end", "step": 3}\n')  # of a start before
    job.cluster.answers("sinfo", "exit 0")
    code, said, calls = job.run("exit 137", "exit 0")
    assert (code, calls) == (0, ["srun", "sinfo", "srun"]) and "again on the same nodes" in said
    job.cluster.answers("sinfo", "echo n2")
    (job.facts.folder / FAULTS).unlink()
    code, said, calls = job.run("exit 137")
    assert (code, calls[:3]) == (1, ["srun", "sinfo", "scontrol"]) and "back into the queue: a node is lost" in said
