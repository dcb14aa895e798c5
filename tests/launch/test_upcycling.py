"""Dense models made into mixtures of experts from the command line, as a checkpoint and at the start of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pentad.configs import load
from pentad.launch.cli import main
from pentad.models.hf.folder import read_hf_config, write_hf
from pentad.models.transformer import Transformer
from pentad.models.weights.initialise import initialise
from pentad.trainer.__main__ import main as run_rank

JOB = """
model: {family: llama, layers: 2, hidden: 32, heads: 4, ffn: 64, vocab: 320, init_std: 0.2}
train: {steps: 2, global_batch: 2, seq_len: 32, dtype: fp64}
optim: {name: adamw}
data: {name: stdlib}
checkpoint: {final: false}
"""
EXPERTS = ["model.moe.experts=8", "model.moe.top_k=4", "model.moe.ffn=32"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A Hugging Face folder of the job's model."""
    (tmp_path / "job.yaml").write_text(JOB)
    cfg = replace(load(tmp_path / "job.yaml").model, max_positions=32)
    model = Transformer(cfg).double()
    initialise(model, cfg)
    write_hf(tmp_path / "dense", cfg, {name: p.detach() for name, p in model.named_parameters()})
    return tmp_path / "dense"


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    """Of a run's steps."""
    places = [f"name={name}", f"runs_dir={folder}/runs", f"data.cache={folder}/cache"]
    assert run_rank([str(folder / "job.yaml"), *places, *overrides]) == 0
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_both_ways_start_as_the_dense_model(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    assert main(["import-hf", str(dense), str(made), "--upcycle", "experts=8,top_k=4,granularity=2"]) == 0
    assert "mixtral, 2 layers, 8 experts, 4 per token; start a job with checkpoint.init=" in capsys.readouterr().out
    assert main(["export-hf", str(made), str(tmp_path / "exported")]) == 0
    assert read_hf_config(tmp_path / "exported")["architectures"] == ["MixtralForCausalLM"]

    expected = losses(tmp_path, "dense", f"checkpoint.init={dense}")
    offline = losses(tmp_path, "offline", *EXPERTS, f"checkpoint.init={made}")
    online = losses(tmp_path, "online", *EXPERTS, f"checkpoint.init={dense}", "checkpoint.upcycle=true")
    assert offline == online  # the same rows in the router
    assert abs(online[0] - expected[0]) < 1e-10
    assert abs(online[1] - expected[1]) > 1e-8  # and trains as a mixture of experts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts=8", "--upcycle: needs top_k"),
        ("experts=8,top_k=two", "--upcycle: cannot use top_k=two"),
        ("experts=8,top_k=2,copies=2", "--upcycle: cannot use copies=2"),
        ("experts=8,top_k=0", "--upcycle: cannot use top_k=0"),
        ("experts=8,top_k=3,granularity=2", "--upcycle top_k: 3 is not a multiple of the granularity 2"),
        ("experts=8,top_k=3,granularity=3", "--upcycle granularity: 3 does not divide"),
    ],
)
def test_mistakes(text: str, message: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["import-hf", str(dense), str(tmp_path / "made"), "--upcycle", text]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}"), lines
    assert not (tmp_path / "made").exists()


def test_the_key_without_weights_or_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert main(["check", str(tmp_path / "job.yaml"), "checkpoint.upcycle=true"]) == 2
    err = capsys.readouterr().err
    assert "checkpoint.upcycle: true needs the dense model's weights; set checkpoint.init" in err
    assert "checkpoint.upcycle: true needs a model with experts; set model.moe.experts" in err
