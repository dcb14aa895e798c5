"""Where a launcher's process becomes a guardian, and what the watchers of several nodes are told of each other."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from pentad.trainer.processes.guarding import guardable
from pentad.trainer.processes.launchers import place
from pentad.trainer.processes.watch import LISTENS, WatchRequest, between_nodes

_SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"} | {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NUM_NODES": "2",
}
_OWN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (_SLURM, True),
        ({**_OWN, "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "1"}, True),
        ({**_OWN, "LOCAL_RANK": "0"}, True),
        (_OWN, False),
        ({}, False),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
    ids=["srun", "torchrun", "own", "own without a local rank", "alone", "one task"],
)
def test_every_launcher_that_says_which_rank_of_its_host_a_process_is(given: dict[str, str], expected: bool) -> None:
    assert guardable({**given, **place(given)}, given) is expected


def test_watchers_find_the_first_one_at_the_address_that_others_reach(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    request = WatchRequest("x", str(tmp_path), 2, 1, 1.0, 2.0, 3.0)
    (tmp_path / LISTENS).write_text("4711")
    first = between_nodes(request, 0, store, ("localhost", store.port), tmp_path)
    second = between_nodes(request, 1, store, ("localhost", store.port), tmp_path)
    assert first.token == second.token and len(first.token) == 32 and first.home == "" and first.listener == -1
    assert second.home == "localhost:4711"  # the store's host is this one, by whatever name the others know it
    with socket.socket(fileno=between_nodes(request, 0, store, ("localhost", store.port)).listener) as listener:
        assert between_nodes(request, 1, store, ("", 0)).home == f"localhost:{listener.getsockname()[1]}"
