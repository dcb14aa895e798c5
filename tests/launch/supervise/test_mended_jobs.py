"""`pentad train` with recovery: a whole job whose ranks are killed ends as if nothing had happened."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pentad.configs.strict_json import read_json
from tests.jobs import DENSE

_SIZE = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=32", "model.vocab=320"),
    *("train.seq_len=16", "train.global_batch=4", "train.micro_batch=1", "train.steps=60", "eval.every=0"),
    *("hardware.peak_tflops=1", "train.deterministic=true", "log.every=1000"),
    *("parallel.tp=1", "parallel.pp=1", "parallel.dp=2"),
]


_TRAIN = ["pentad.launch.cli", "train"]
_TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pentad.trainer"]


def _start(runs: Path, name: str, *more: str, launcher: list[str] = _TRAIN) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *launcher, DENSE, *_SIZE, f"name={name}", f"runs_dir={runs}", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _kill(run: Path, slot: int) -> None:
    """Kills whoever is in a slot."""
    ring = max((r for r in read_json(run / "record" / "index.json")["rings"] if r["rank"] == slot), key=_epoch)
    os.kill(ring["pid"], signal.SIGKILL)


def _epoch(ring: dict[str, Any]) -> int:
    return ring["epoch"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_whose_ranks_are_killed_ends_with_the_same_curve_and_bits(tmp_path: Path) -> None:
    hurt = _start(tmp_path, "hurt", "faults.recover=true", "faults.spares=1")
    try:
        for slot, step in ((0, 5), (1, 25)):
            until = time.monotonic() + 120
            while len(_lines(tmp_path / "hurt" / "metrics.jsonl")) < step:
                assert hurt.poll() is None and time.monotonic() < until, hurt.communicate()
                time.sleep(0.01)
            _kill(tmp_path / "hurt", slot)
        _, errors = hurt.communicate(timeout=120)
    finally:
        hurt.kill()
    assert hurt.returncode == 0, errors
    whole = _start(tmp_path, "whole")
    assert whole.communicate(timeout=120) and whole.returncode == 0
    keys = ("step", "loss", "grad_norm", "tokens")
    curves = [
        [[row[key] for key in keys] for row in _lines(tmp_path / name / "metrics.jsonl")] for name in ("hurt", "whole")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 60
    events = _lines(tmp_path / "hurt" / "events.jsonl")
    assert [event["ranks"] for event in events if event["event"] == "fault"] == [[0], [1]]
    assert [event["epoch"] for event in events if event["event"] == "recovered"] == [1, 2]
    files = sorted((tmp_path / "whole" / "checkpoints").rglob("*.safetensors"))
    assert files and all(filecmp.cmp(f, tmp_path / "hurt" / f.relative_to(tmp_path / "whole"), False) for f in files)
    assert not list(Path("/dev/shm").glob("pentad-hurt-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_that_shrinks_and_grows_back_ends_with_the_same_curve_and_bits(tmp_path: Path) -> None:
    elastic = ["train.deterministic=elastic", "train.steps=600", "parallel.dp=4", "train.global_batch=12"]
    ladder = ["faults.recover=true", "faults.ladder=[spare,shrink,respawn]"]
    hurt = _start(tmp_path, "hurt", *elastic, *ladder)
    events = tmp_path / "hurt" / "events.jsonl"
    try:
        for slot, epoch in ((2, 0), (0, 2)):
            until = time.monotonic() + 120
            while not (epoch == 0 and len(_lines(tmp_path / "hurt" / "metrics.jsonl")) > 5) and not any(
                each["event"] == "recovered" and each["epoch"] >= epoch > 0 for each in _lines(events)
            ):
                assert hurt.poll() is None and time.monotonic() < until, hurt.communicate()
                time.sleep(0.01)
            _kill(tmp_path / "hurt", slot)
        _, errors = hurt.communicate(timeout=240)
    finally:
        hurt.kill()
    assert hurt.returncode == 0, errors
    whole = _start(tmp_path, "whole", *elastic)
    assert whole.communicate(timeout=240) and whole.returncode == 0
    keys = ("step", "loss", "grad_norm", "tokens")
    curves = [
        [[row[key] for key in keys] for row in _lines(tmp_path / name / "metrics.jsonl")] for name in ("hurt", "whole")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 600
    told = [event for event in _lines(events) if event["event"] == "recovered"]
    assert [event["rung"] for event in told][:3] == ["shrink", "grow", "shrink"]
    assert told[0]["layout"] == "dp=3" and told[1]["layout"] == "" and told[1]["redone"] == 0
    files = sorted((tmp_path / "whole" / "checkpoints").rglob("*.safetensors"))
    assert files and all(filecmp.cmp(f, tmp_path / "hurt" / f.relative_to(tmp_path / "whole"), False) for f in files)
    assert not list(Path("/dev/shm").glob("pentad-hurt-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_does_not_hear_of_a_fault_that_is_mended(tmp_path: Path) -> None:
    hurt = _start(tmp_path, "torchrun", "faults.recover=true", "faults.spares=1", launcher=_TORCHRUN)
    try:
        until = time.monotonic() + 120
        while len(_lines(tmp_path / "torchrun" / "metrics.jsonl")) < 5:
            assert hurt.poll() is None and time.monotonic() < until, hurt.communicate()
            time.sleep(0.01)
        _kill(tmp_path / "torchrun", 0)
        _, errors = hurt.communicate(timeout=120)
    finally:
        hurt.kill()
    assert hurt.returncode == 0, errors
    assert "fault: rank 0 was killed by SIGKILL" in errors
    assert [row["step"] for row in _lines(tmp_path / "torchrun" / "metrics.jsonl")] == [*range(1, 61)]
    assert not list(Path("/dev/shm").glob("pentad-torchrun-*"))
