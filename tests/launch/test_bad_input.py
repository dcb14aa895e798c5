"""Wrong jobs, as a user makes them: one clear line each, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from pentad.trainer.__main__ import main
from tests.jobs import DENSE

SMALL = (
    "model.layers=1", "model.hidden=16", "model.heads=2", "model.kv_heads=2", "model.ffn=16", "model.vocab=320",
    "parallel.tp=1", "parallel.dp=1", "train.seq_len=16", "train.steps=2", "train.global_batch=2",
    "train.micro_batch=1", "eval.every=0", "hardware.peak_tflops=1", "optim.schedule.warmup_steps=0",
)  # fmt: skip


def _files(folder: Path) -> None:
    """Damaged and empty inputs."""
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short")
    (folder / "bad.yaml").write_text("train: [1,\n")
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "magic.idx").write_bytes(b"NOTANIDX" * 8)
    (folder / "magic.bin").write_bytes(b"\0" * 64)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 5)
    (folder / "cut.idx").write_bytes(header + b"\0" * 10)
    (folder / "cut.bin").write_bytes(b"\0" * 64)
    (folder / "half.idx").write_bytes(header)
    (folder / "folder").mkdir()


CASES = [
    (("train.stpes=3",), "did you mean train.steps"),
    (("modle.hidden=3",), "did you mean model"),
    (("train.steps=many",), "train.steps"),
    (("train.dtype=fp8",), "train.dtype"),
    (("optim.name=adam",), "adamw"),
    (("optim.schedule.name=cos",), "cosine"),
    (("data.name=books",), "stdlib"),
    (("model.preset=llama9",), "model.preset"),
    (("train.lr=1",), "train.lr"),
    (("parallel.tp=3",), "parallel.tp"),
    (("parallel.dp=2",), "parallel.dp"),
    (("parallel.cp=2",), "parallel.cp"),
    (("train.global_batch=3", "train.micro_batch=2"), "train.global_batch"),
    (("model.heads=3", "model.head_dim=8", "model.kv_heads=2"), "model.heads: 3"),
    (("model.kv_heads=4",), "kv_heads"),
    (("train.seq_len=0",), "train.seq_len"),
    (("optim.lr=-1",), "optim.lr"),
    (("data.holdout=1.5",), "data.holdout"),
    (("model.vocab=64",), "64"),
    (("data.name=text", "data.paths=[nowhere.txt]"), "nowhere.txt"),
    (("data.name=text", "data.paths=[{tmp}/empty.txt]"), "no text"),
    (("data.name=text", "data.paths=[{tmp}/short.txt]"), "10 tokens"),
    (("data.name=jsonl", "data.paths=[{tmp}/bad.jsonl]"), "bad.jsonl:2"),
    (("data.name=bin", "data.paths=[{tmp}/half]"), "half.bin"),
    (("data.name=bin", "data.paths=[{tmp}/magic]"), "magic.idx"),
    (("data.name=bin", "data.paths=[{tmp}/cut]"), "cut.idx"),
    (("data.tokenizer.path={tmp}/tokenizer.json",), "tokenizer.json"),
    (("checkpoint.resume={tmp}/nowhere",), "nowhere"),
    (("checkpoint.resume={tmp}/folder",), "folder"),
    (("checkpoint.init={tmp}/folder",), "folder"),
    (("optim.impl=apex",), "apex"),
    (("runs_dir={tmp}/empty.txt",), "cannot be written"),
    (("--train.steps=3",), "no leading dashes"),
    (("steps",), "key=value"),
]


SEVERAL = {("parallel.tp=3",), ("parallel.cp=2",)}
"""These break several rules at once, and each is said."""


@pytest.mark.parametrize(("overrides", "expected"), CASES, ids=[" ".join(c[0]) for c in CASES])
def test_one_clear_line(
    overrides: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _files(tmp_path)
    given = [o.replace("{tmp}", str(tmp_path)) for o in overrides]
    places = [f"runs_dir={tmp_path}/runs", f"data.cache={tmp_path}/cache"]
    assert main([DENSE, *SMALL, *places, *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    if overrides in SEVERAL:
        lines = [line for line in lines if expected in line][:1]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert expected in lines[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "manifest"])
def test_a_damaged_checkpoint(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"runs_dir={tmp_path}/runs", "checkpoint.every=1"]
    assert main([DENSE, *SMALL, *places]) == 0
    older, newest = sorted((tmp_path / "runs/demo/checkpoints").iterdir())
    victim = next(newest.glob("*.safetensors"))
    match damage:
        case "flip":
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        case "cut":
            victim.write_bytes(victim.read_bytes()[:-7])
        case "lose":
            victim.unlink()
        case _:
            (newest / "manifest.json").write_text("{")
    capsys.readouterr()
    assert main([DENSE, *SMALL, *places, f"checkpoint.resume={newest}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(newest) in lines[0]
    # `latest` says so, and goes on from the one before.
    assert main([DENSE, *SMALL, *places, "checkpoint.resume=latest"]) == 0
    captured = capsys.readouterr()
    assert str(newest) in captured.err
    assert f"resumed from {older} at step 1" in captured.out
    events = [json.loads(line) for line in (tmp_path / "runs/demo/events.jsonl").read_text().splitlines()]
    assert any(e["event"] == "checkpoint_damaged" for e in events)
    shutil.rmtree(tmp_path / "runs")


def test_a_value_from_the_environment_is_in_no_message_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hunter2-tHe-pAsSwOrD"
    monkeypatch.setenv("PENTAD_TEST_SECRET", secret)
    (tmp_path / secret).mkdir()
    (tmp_path / secret / "short.txt").write_text("too short")
    places = [f"runs_dir={tmp_path}/runs", "data.cache=" + str(tmp_path) + "/${oc.env:PENTAD_TEST_SECRET}/cache"]
    text = ["data.name=text", "data.paths=" + str(tmp_path) + "/${oc.env:PENTAD_TEST_SECRET}/*.txt"]
    assert main([DENSE, *SMALL, *places, *text]) == 2  # the text is too short, which is found with the data open
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and secret not in captured.err + captured.out
    assert main([DENSE, *SMALL, *places, "log.wandb_project=${oc.env:PENTAD_TEST_SECRET}"]) == 0
    captured = capsys.readouterr()
    assert secret not in captured.err + captured.out
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_a_job_without_prefetching_trains_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for prefetch in (0, 4):
        where = [f"runs_dir={tmp_path}/{prefetch}", f"data.prefetch={prefetch}", "parallel.pipeline.schedule=gis"]
        assert main([DENSE, *SMALL, *where, "eval.every=1", "train.dtype=fp64"]) == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1 and "no effect with parallel.pp=1" in warnings[0]
        lines = (tmp_path / f"{prefetch}/demo/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) == 2
