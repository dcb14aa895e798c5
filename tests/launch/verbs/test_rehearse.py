"""`pentad rehearse`: what it takes, what it says, and a rehearsal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pentad.configs import UserError, load
from pentad.launch.cli import main
from pentad.launch.verbs.rehearse import RehearsedFault, _found, _words, rehearse
from tests.jobs import DENSE

_KILL = RehearsedFault("kill", 1, 20, 100.0)
_FAULT = {"event": "fault", "time": 100.012, "epoch": 1, "line": "rank 1 was killed by SIGKILL"}
_WENT_ON = {
    **{"event": "recovered", "epoch": 1, "rung": "spare", "step": 19, "ms": 310.0, "redone": 1},
    "parts_ms": {"notice": 11.2, "leave": 60.0},
}


def test_faults_are_read_and_wrong_ones_are_told_in_one_line() -> None:
    cfg = load(DENSE, ["parallel.dp=2", "train.global_batch=8"])
    assert RehearsedFault.parse("stop:rank=1@step=2", cfg) == RehearsedFault("stop", 1, 2)
    for text, words in (
        ("kill", "KIND:rank=R@step=S"),
        ("kil:rank=0@step=1", "set kill"),
        (f"kill:rank={cfg.parallel.ranks}@step=1", f"ranks 0 to {cfg.parallel.ranks - 1}"),
        ("kill:rank=0@step=0", "steps 1 to"),
    ):
        with pytest.raises(UserError, match=words):
            RehearsedFault.parse(text, cfg)


def test_faults_of_nodes_need_several() -> None:
    cfg = load(DENSE, ["parallel.dp=2", "train.global_batch=8"])
    assert RehearsedFault.parse("kill:node=1@step=2", cfg, 2) == RehearsedFault("kill", -1, 2, node=1)
    for text, nodes, words in (
        ("kill:node=0@step=1", 1, "one node; give --nodes 2"),
        ("kill:node=2@step=1", 2, "nodes 0 to 1"),
        ("stop:node=1@step=1", 2, "kill of a node"),
        ("hang:rank=1@step=1", 2, "kill and stop of a rank"),
    ):
        with pytest.raises(UserError, match=words):
            RehearsedFault.parse(text, cfg, nodes)
    with pytest.raises(UserError, match="spread evenly"):
        rehearse(DENSE, ["parallel.dp=2"], ["kill:node=1@step=2"], nodes=3)


def test_nothing_is_started_without_a_fault(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["rehearse", DENSE, f"runs_dir={tmp_path}"]) == 2
    assert "--fault is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_said_of_a_mended_fault_an_end_and_one_that_never_came() -> None:
    found = _found([_KILL], [_FAULT, _WENT_ON])
    assert found[0]["seen_s"] == 0.012
    assert _words(found, [RehearsedFault("stop", 0, 50)], 0) == [
        "kill of rank 1 in step 20:",
        "  seen after 12 ms: rank 1 was killed by SIGKILL",
        "  spare: went on at step 19 after 310 ms (notice 11, leave 60); 1 step done again",
        "stop of rank 0 in step 50: the job was over before",
        "the job ended with exit code 0",
    ]
    ended = _found([_KILL], [{**_FAULT, "event": "verdict"}])
    assert "  the job ended" in _words(ended, [], 137)
    assert "  nobody saw it" in _words(_found([_KILL], []), [], 0)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hang_and_a_kill_are_rehearsed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job = ["model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=32", "train.seq_len=16", "eval.every=0"]
    job += ["parallel.dp=2", "train.global_batch=4", "train.micro_batch=1", "train.steps=100000", "name=job"]
    job += ["faults.recover=true", "faults.timeout_s=60", "faults.hang_s=4", "faults.alive_s=2", f"runs_dir={tmp_path}"]
    faults = ["--fault", "hang:rank=0@step=5", "--fault", "kill:rank=1@step=12", "--json"]
    assert main(["rehearse", DENSE, *job, "hardware.peak_tflops=1", *faults]) == 0
    said: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert said["mended"] and said["code"] == 0
    assert [fault["kind"] for fault in said["faults"]] == ["hang", "kill"]
    assert [fault["verdict"]["ranks"] for fault in said["faults"]] == [[0], [1]]
    assert all(fault["recovered"]["rung"] == "respawn" for fault in said["faults"])
    assert (tmp_path / "job.rehearsal" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_loss_of_the_first_node_is_rehearsed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job = ["model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=32", "train.seq_len=16", "eval.every=0"]
    job += ["parallel.dp=2", "train.global_batch=4", "train.micro_batch=1", "train.steps=100000", "name=job"]
    job += ["faults.recover=true", "faults.spares=1", f"runs_dir={tmp_path}", "hardware.peak_tflops=1"]
    assert main(["rehearse", DENSE, *job, "--nodes", "2", "--fault", "kill:node=0@step=100", "--json"]) == 0
    said: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert said["mended"] and said["code"] == 0
    (fault,) = said["faults"]
    assert fault["verdict"]["kind"] == "lost node" and fault["recovered"]["lost"] == [0]
