"""`pentad checkpoint`: what it lists, what it finds wrong, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.launch.cli import main
from pentad.parallel.global_tensor import GlobalTensor
from pentad.trainer.checkpoint.same_run import layout_of
from tests.trainer.checkpoint.layouts import checkpointer, global_values
from tests.training import job

LAYOUT = {"layout": layout_of(job(tp=2, dp=2, sharding="zero1")), "same": {"train.dtype": "bf16"}}


def run_of(folder: Path, *steps: int) -> Path:
    """A run's folder with checkpoints, evaluated at even steps."""
    saver = checkpointer(folder / "checkpoints")
    tensors = {name: GlobalTensor.of(value) for name, value in global_values().items()}
    for step in steps:
        saver.save(step, tensors, {**LAYOUT, "evaluation": {"step": step - step % 2, "loss": 3 + step / 100}})
    return folder


def _ended(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(["checkpoint", *argv])
    done = capsys.readouterr()
    return code, done.out + done.err


def test_list_says_what_each_is_and_which_one_latest_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", 9, 10, 11)
    code, text = _ended(capsys, "list", str(run))
    lines = text.splitlines()
    assert code == 0 and lines[0] == str(run / "checkpoints")
    assert lines[1].split() == ["step", "saved", "size", "layout", "dtype", "held-out", "state"]
    assert [line.split()[0] for line in lines[2:]] == ["9", "10", "11"]
    for line, loss in zip(lines[2:], ("-", "3.1000", "-"), strict=True):
        assert "KiB  dp=2 tp=2 zero1  bf16" in line and line.split()[-2 if "(" in line else -1] in ("complete", loss)
        assert f" {loss}  complete" in line
    assert [line.endswith("(latest)") for line in lines[2:]] == [False, False, True]
    os.truncate(run / "checkpoints" / "step-00000011" / "rank-00000-0.safetensors", 100)
    code, text = _ended(capsys, "list", str(run / "checkpoints"))
    assert code == 1 and "damaged: rank-00000-0.safetensors has 100 bytes instead of" in text
    assert [line.split()[0] for line in text.splitlines() if "(latest)" in line] == ["10"]
    code, text = _ended(capsys, "list", "--json", "--verify", str(run))
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert [(r["step"], r["verified"], r["latest"], r["held_out"]) for r in rows] == [
        (9, True, False, None),
        (10, True, True, 3.1),
        (11, False, False, None),
    ]
    assert rows[1]["nbytes"] == sum(file.stat().st_size for file in Path(rows[1]["path"]).iterdir())


def test_verify_reads_every_byte_and_names_each_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", 1, 2)
    code, text = _ended(capsys, "verify", str(run))
    assert code == 0 and text.count(": verified, 21 tensors in 21 boxes, each element once, ") == 2
    bad = run / "checkpoints" / "step-00000002"
    for name in ("rank-00000-0.safetensors", "state.json"):
        data = bytearray((bad / name).read_bytes())
        data[-5] ^= 4
        (bad / name).write_bytes(data)
    (bad / "rank-00000-9.safetensors").write_bytes(b"of another")
    code, text = _ended(capsys, "verify", str(bad), str(run))
    assert code == 1 and text.count(f"{bad}: damaged") == 1 and "step-00000001: verified" in text
    assert "  rank-00000-0.safetensors has checksum" in text and "  state.json has checksum" in text
    assert "  rank-00000-9.safetensors is not part of it" in text
    (row,) = (json.loads(line) for line in _ended(capsys, "verify", "--json", str(bad))[1].splitlines())
    assert not row["ok"] and len(row["problems"]) == 2 and row["strays"] == ["rank-00000-9.safetensors"]
    assert _ended(capsys, "list", str(run))[0] == 1, "state.json is read by list"


def _with_index(path: Path, change: Any) -> None:
    """Gives a checkpoint another index, for which its manifest vouches."""
    index = json.loads((path / "tensors.json").read_text())
    change(index["tensors"])
    data = json.dumps(index).encode()
    (path / "tensors.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["tensors.json"] = {"size": len(data), "crc32": zlib.crc32(data)}
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    manifest["crc32"] = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_verify_accounts_for_every_element(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run_of(tmp_path / "run", 1) / "checkpoints" / "step-00000001"

    def hole(tensors: dict[str, Any]) -> None:
        tensors["model/embed"]["boxes"][0][3][0] -= 1

    def twice(tensors: dict[str, Any]) -> None:
        tensors["model/embed"]["boxes"] *= 2

    def same_bytes(tensors: dict[str, Any]) -> None:
        tensors["model/embed"]["boxes"][0][1] = tensors["optim/exp_avg/embed"]["boxes"][0][1]

    for change, reason in (
        (hole, "of the 72 elements of model/embed at (0, 0), it does not hold each once"),
        (twice, "of the 72 elements of model/embed at (0, 0), it does not hold each once"),
        (same_bytes, "is said to be both of model/embed and of optim/exp_avg/embed"),
    ):
        path = tmp_path / change.__name__
        shutil.copytree(good, path)
        _with_index(path, change)
        code, text = _ended(capsys, "verify", str(path))
        assert code == 1 and reason in text


def test_what_is_no_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    near = tmp_path / "run" / "checkpoints"
    code, text = _ended(capsys, "verify", str(tmp_path / "empty"), str(near / "step-00000007"))
    assert code == 2 and text.splitlines() == [
        f"error: {tmp_path}/empty: holds no checkpoint; name a checkpoint, a folder of them, or a run",
        f"error: {near}/step-00000007: there is no such checkpoint or run; there are {near}/step-00000001",
    ]
    assert _ended(capsys)[0] == 2 and _ended(capsys, "vrify", "x")[0] == 2
    torch.save({}, tmp_path / "file")
    assert _ended(capsys, "list", str(tmp_path / "file"))[0] == 2
