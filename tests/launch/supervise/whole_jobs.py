"""Small jobs with recovery, started as users start them, whose processes are killed."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pentad.configs.strict_json import read_json
from pentad.launch.supervise.nodes.pretended import PretendedNodes
from tests.jobs import DENSE

STEPS = 60
SIZE = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=32", "model.vocab=320"),
    *("train.seq_len=16", "train.global_batch=4", "train.micro_batch=1", f"train.steps={STEPS}", "eval.every=0"),
    *("hardware.peak_tflops=1", "train.deterministic=true", "log.every=1000"),
    *("parallel.tp=1", "parallel.pp=1", "parallel.dp=2"),
]
RECOVER = ["faults.recover=true", "faults.spares=1"]
TRAIN = ["pentad.launch.cli", "train"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pentad.trainer"]


def start(runs: Path, name: str, *more: str, launcher: list[str] = TRAIN) -> subprocess.Popen[str]:
    """Starts a job."""
    command = [sys.executable, "-m", *launcher, DENSE, *SIZE, f"name={name}", f"runs_dir={runs}", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a file of lines."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Those of a run of one kind."""
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def until_step(run: Path, step: int, job: subprocess.Popen[Any]) -> None:
    """Waits until a run has reported a step."""
    until = time.monotonic() + 120
    while len(lines(run / "metrics.jsonl")) < step:
        assert job.poll() is None and time.monotonic() < until, job.communicate()
        time.sleep(0.01)


def until_recovered(run: Path, epoch: int, job: subprocess.Popen[Any]) -> None:
    """Waits until a run trains in the mesh of an epoch, or a later one."""
    until = time.monotonic() + 120
    while not any(event["epoch"] >= epoch for event in events(run, "recovered")):
        assert job.poll() is None and time.monotonic() < until, job.communicate()
        time.sleep(0.01)


def in_slot(run: Path, slot: int) -> int:
    """The process in a slot."""
    rings = [ring for ring in read_json(run / "record" / "index.json")["rings"] if ring["rank"] == slot]
    return max(rings, key=lambda ring: ring["epoch"])["pid"]


def spares(run: Path) -> list[Path]:
    """Rings of this host that are none of those of the ranks that a run began with."""
    rings = read_json(run / "record" / "index.json")["rings"]
    stem = rings[0]["file"].rpartition("-")[0]
    known = {ring["file"] for ring in rings if ring["epoch"] == 0}
    return [file for file in Path(stem).parent.glob(f"{Path(stem).name}-*.ring") if str(file) not in known]


def kill(run: Path, slot: int) -> None:
    """Kills whoever is in a slot."""
    os.kill(in_slot(run, slot), signal.SIGKILL)


def assert_same_end(hurt: Path, whole: Path, steps: int = STEPS) -> None:
    """Two runs have the same curve, and the same checkpoints to the bit."""
    keys = ("step", "loss", "grad_norm", "tokens")
    curves = [[[row[key] for key in keys] for row in lines(run / "metrics.jsonl")] for run in (hurt, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == steps
    files = sorted((whole / "checkpoints").rglob("*.safetensors"))
    assert files and all(filecmp.cmp(file, hurt / file.relative_to(whole), False) for file in files)


def undisturbed(runs: Path, *more: str) -> Path:
    """The run of the job without any fault."""
    job = start(runs, "whole", *more)
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    return runs / "whole"


class JobOverNodes:
    """A job over nodes that are all on this machine.

    Args:
        runs, name: of the run.
        nodes: how many.
        more: overrides.
        each: ranks of a node.
    """

    def __init__(self, runs: Path, name: str, nodes: int, *more: str, each: int = 1) -> None:
        self.run = runs / name
        self._logs = [runs / f"{name}.{rank}.log" for rank in range(nodes * each)]
        argv = [DENSE, *SIZE, f"name={name}", f"runs_dir={runs}", *more]
        with ExitStack() as open_files:
            logs = [open_files.enter_context(open(log, "w")) for log in self._logs]
            self.nodes = PretendedNodes(nodes, each, argv, {**os.environ, "OMP_NUM_THREADS": "1"}, logs)

    def until_step(self, step: int) -> None:
        """Waits until the run has reported a step."""
        self._until(lambda: len(lines(self.run / "metrics.jsonl")) >= step)

    def until_ready(self, count: int) -> None:
        """Waits until so many spares are there, and all watchers know each other."""
        self._until(lambda: (self.run / "record" / "index.json").exists() and len(spares(self.run)) >= count)
        time.sleep(1.0)  # they open their data, and what the watchers know of each other follows

    def _until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + 120
        while not holds():
            lost = [code for code in self.nodes.codes() if code is not None]
            assert time.monotonic() < until and all(code == -signal.SIGKILL for code in lost), self.said()
            time.sleep(0.01)

    def end(self) -> list[int | None]:
        """Exit codes of all launchers, by rank."""
        until = time.monotonic() + 150
        while None in self.nodes.codes():
            assert time.monotonic() < until, self.said()
            time.sleep(0.05)
        return self.nodes.codes()

    def said(self) -> str:
        """What all ranks and watchers have printed."""
        return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in self._logs)
