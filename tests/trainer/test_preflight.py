"""What would stop a job soon after its start is found before any rank starts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pentad.configs import UserError, load
from pentad.trainer.__main__ import main as run_rank
from pentad.trainer.preflight import preflight
from tests.jobs import DENSE


def _problems(*overrides: str) -> dict[str, str]:
    try:
        preflight(load(DENSE, overrides))
    except UserError as error:
        return {problem.key: problem.message for problem in error.problems}
    return {}


def test_a_job_without_problems_passes_and_leaves_no_trace(tmp_path: Path) -> None:
    assert _problems(f"runs_dir={tmp_path}/runs", f"checkpoint.dir={tmp_path}/checkpoints") == {}
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_and_folders_in_the_way_are_reported_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "file").write_text("")
    found = _problems("log.wandb=true", "log.tensorboard=true", "log.prometheus=9400", f"runs_dir={tmp_path}/file/runs")
    assert found.keys() == {"log.wandb", "log.tensorboard", "log.prometheus", "runs_dir"}
    assert "pentad[wandb]" in found["log.wandb"]
    assert "file is not a folder" in found["runs_dir"]


def test_a_read_only_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    # As root everything is writable, so the answer of a read-only file system is stood in for.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    local = (f"checkpoint.local.dir={tmp_path}/c", "checkpoint.local.every=2")
    found = _problems(f"runs_dir={tmp_path}/runs", f"checkpoint.dir={tmp_path}/a/b", *local)
    assert found.keys() == {"runs_dir", "checkpoint.dir", "checkpoint.local.dir"}


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from pentad.configs import load; from pentad.trainer.preflight import preflight;"
        "preflight(load('demo')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rank_of_another_launcher_looks_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_rank([DENSE, "parallel.tp=1", "parallel.dp=1", f"runs_dir={tmp_path}/file"]) == 2
    assert capsys.readouterr().err.startswith("error: runs_dir: ")


def test_the_disk_for_masters_and_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("memory.offload_optimizer=disk", f"runs_dir={tmp_path}/runs")
    assert _problems(*wanted, f"memory.offload_disk={tmp_path}") == {}
    assert "there is no folder" in _problems(*wanted, f"memory.offload_disk={tmp_path}/absent")["memory.offload_disk"]
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=4096))
    message = _problems(*wanted, "train.dtype=bf16", f"memory.offload_disk={tmp_path}")["memory.offload_disk"]
    assert "GiB of masters and moments, and 0 GiB are free" in message
