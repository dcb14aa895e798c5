"""Whole jobs over pretended nodes: ranks and nodes are killed, and the job ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..whole_jobs import RECOVER, JobOverNodes, assert_same_end, events, kill, undisturbed

STEPS = 240
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("whole"), f"train.steps={STEPS}")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[[str], JobOverNodes]]:
    """Starts a job of two nodes with a rank and a spare each."""
    started: list[JobOverNodes] = []

    def start(name: str) -> JobOverNodes:
        started.append(JobOverNodes(tmp_path, name, 2, *RECOVER, f"train.steps={STEPS}"))
        return started[-1]

    yield start
    for each in started:
        each.nodes.close()


def test_a_rank_of_the_second_node_is_replaced_there(job: Callable[[str], JobOverNodes], whole: Path) -> None:
    hurt = job("rank")
    hurt.until_ready(2)
    hurt.until_step(5)
    kill(hurt.run, 1)
    hurt.until_step(25)
    kill(hurt.run, 0)
    assert hurt.end() == [0, 0], hurt.said()
    assert_same_end(hurt.run, whole, STEPS)
    assert [(event["ranks"], event["rung"]) for event in events(hurt.run, "fault")] == [([1], "spare"), ([0], "spare")]
    assert not list(Path("/dev/shm").glob("pentad-rank-*"))


@pytest.mark.parametrize("node", [1, 0])
def test_a_whole_node_is_lost(job: Callable[[str], JobOverNodes], whole: Path, node: int) -> None:
    hurt = job(f"node-{node}")
    hurt.until_ready(2)
    hurt.until_step(5)
    hurt.nodes.lose(node)
    codes = hurt.end()
    assert codes[1 - node] == 0 and codes[node] == -9, hurt.said()
    assert_same_end(hurt.run, whole, STEPS)
    (recovered,) = events(hurt.run, "recovered")
    assert (recovered["lost"], recovered["rung"], recovered["from"]) == ([node], "spare", "snapshots")


def test_the_store_is_lost(job: Callable[[str], JobOverNodes], whole: Path) -> None:
    hurt = job("store")
    hurt.until_ready(2)
    hurt.until_step(5)
    (store,) = [pid for pid in hurt.nodes.processes(0) if _is_store(pid)]
    os.kill(store, signal.SIGKILL)
    hurt.until_step(25)
    kill(hurt.run, 1)
    assert hurt.end() == [0, 0], hurt.said()
    assert_same_end(hurt.run, whole, STEPS)


def _is_store(pid: int) -> bool:
    """The only child of the fork server that shows no signs of life."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    forked = b"supervise.fork_server" in Path(f"/proc/{parent}/cmdline").read_bytes()
    return forked and ".ring" not in maps
