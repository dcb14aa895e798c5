"""Which rank a process is, from the variables that each launcher sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pentad.configs import UserError
from pentad.trainer.processes.launchers import hosts, place
from tests.jobs import DENSE
from tests.launch.test_bad_input import SMALL

_STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
}
_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one", ["one"]),
        ("a,b-3", ["a", "b-3"]),
        ("n[001-003,7]", ["n001", "n002", "n003", "n7"]),
        ("login,n[9-11],x[1-2]y[3-4]", ["login", "n9", "n10", "n11", "x1y3", "x1y4", "x2y3", "x2y4"]),
    ],
)
def test_node_lists(text: str, expected: list[str]) -> None:
    assert list(hosts(text)) == expected


@pytest.mark.parametrize("text", ["n[", "n[a-b]", "n[1-]", "a;b", "n[1-2"])
def test_other_texts_are_no_node_lists(text: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        list(hosts(text))


def test_a_task_of_srun() -> None:
    found = place(_STEP)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
    }
    assert 1024 < int(port) < 32768
    assert place({**_STEP, "SLURM_PROCID": "0"})["MASTER_PORT"] == port != place({**_STEP, "SLURM_STEP_ID": "1"})
    assert place({**_STEP, "MASTER_ADDR": "head", "MASTER_PORT": "5"}).items() >= {
        ("MASTER_ADDR", "head"),
        ("MASTER_PORT", "5"),
    }


def test_a_batch_script_or_a_single_task_is_no_rank() -> None:
    assert place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == {}
    assert place({**_STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert place({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) == {}
    assert place({}) == {}


def test_tasks_of_mpirun_and_of_pmi() -> None:
    first, second = (place({**_MPI, "OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_LOCAL_RANK": r}) for r in "01")
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "0", "1", "1")
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    pmi = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "head"}
    assert place({**pmi, "PBS_JOBID": "9"}).items() >= {("RANK", "3"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "head")}
    # mpirun starts its own task on each host of an allocation; srun with PMI tells the same twice.
    assert place({**_STEP, **_MPI, "SLURM_PROCID": "0"})["RANK"] == "1"
    assert place({**_STEP, "PMI_RANK": "5", "PMI_SIZE": "8"})["MASTER_ADDR"] == "gpu007"


def test_what_torchrun_or_the_user_says_wins() -> None:
    given = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place(given) == local
    assert place({**given, **_STEP, "SLURM_PROCID": "7", "TORCHELASTIC_RUN_ID": "x"}) == local
    assert place({**given, **_STEP, "RANK": "9", "WORLD_SIZE": "16", "SLURM_PROCID": "4"}) == local  # 2 ranks a task


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: is not set"),
        ({"WORLD_SIZE": "2"}, "RANK: is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is not a number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK=(empty)"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 must be below"),
        ({"RANK": "0", "WORLD_SIZE": "1", **_STEP}, "contradicts SLURM, where this is task 5 of 8"),
        ({"RANK": "0", "WORLD_SIZE": "2", **_MPI}, "contradicts Open MPI, where this is task 1 of 2"),
        ({**_STEP, "SLURM_PROCID": "8"}, "SLURM_PROCID=8 must be below SLURM_NTASKS=8"),
        ({**_STEP, "SLURM_LOCALID": "9"}, "SLURM_LOCALID=9 must be below"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "no SLURM_STEP_ID"),
        ({**_MPI, "PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI says rank 0 of 2"),
        ({**_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR: is not set"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MASTER_ADDR": "head", "PBS_JOBID": "1"}, "LOCAL_RANK: is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set"),
        ({"PMIX_RANK": "1"}, "nothing says of how many"),
    ],
)
def test_facts_that_contradict_each_other_or_do_not_suffice(env: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as refused:
        place(env)
    (problem,) = refused.value.problems
    assert expected in str(problem)


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.distributed
def test_two_tasks_of_srun_make_one_job(tmp_path: Path) -> None:
    facts = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": _free_port(),
        "OMP_NUM_THREADS": "1",
    }
    job = [sys.executable, "-m", "pentad.trainer", DENSE, *SMALL, f"runs_dir={tmp_path}", "parallel.dp=2", "name=a"]
    tasks = [
        subprocess.Popen(
            job,
            env={**os.environ, **facts, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    try:
        outputs = [task.communicate(timeout=120)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "dp 2" in outputs[0] and outputs[1] == ""
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 2
