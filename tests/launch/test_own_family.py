"""A family that Pentad does not know, from its owner's module through import, training over ranks and export; with a
schedule and a metric from the same module."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pentad.launch.cli import main
from pentad.trainer.__main__ import main as run_rank
from tests.models.hf import random_hf

ROOT = Path(__file__).parents[2]
JOB = """
name: {name}
model: {{family: {family}, layers: 2, hidden: 32, heads: 4, ffn: 64, vocab: 320{keys}}}
train: {{steps: 2, global_batch: 4, seq_len: 32, dtype: fp32, deterministic: true}}
optim: {{lr: 0.01, schedule: {{name: constant}}}}
data: {{name: stdlib, cache: cache}}
checkpoint: {{init: {init}}}
"""
LLAMA_KEYS = ", kv_heads: 2, norm_eps: 0.001, rope: {theta: 500.0}"
COMMANDS = (
    "import-hf --import own_family acorn start",
    "export-hf --import own_family start back",
    "train --import own_family acorn.yaml parallel.tp=2 parallel.pp=2 parallel.pipeline.schedule=newest-first",
    "export-hf --import ./own_family.py runs/acorn trained",
    "generate --import own_family runs/acorn --prompt ab --max-new-tokens 3",
)
DRIVER = "import sys; from pentad.launch.cli import main; sys.exit(max(main(c.split()) for c in sys.argv[1:]))"


def acorn(llama: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a Llama as the made-up family stores them, by hand."""
    found = {"lm_head.weight": llama["lm_head.weight"], "acorn.embed": llama["model.embed_tokens.weight"]}
    found["acorn.norm"] = 2 * llama["model.norm.weight"]
    for i in range(2):
        theirs, ours = f"model.layers.{i}", f"acorn.blocks.{i}"
        found[f"{ours}.norm1"] = 2 * llama[f"{theirs}.input_layernorm.weight"]
        found[f"{ours}.norm2"] = 2 * llama[f"{theirs}.post_attention_layernorm.weight"]
        found[f"{ours}.qkv"] = torch.cat([llama[f"{theirs}.self_attn.{letter}_proj.weight"] for letter in "qkv"])
        found[f"{ours}.out"] = llama[f"{theirs}.self_attn.o_proj.weight"]
        found[f"{ours}.gate"] = llama[f"{theirs}.mlp.gate_proj.weight"]
        found[f"{ours}.up"] = llama[f"{theirs}.mlp.up_proj.weight"]
        found[f"{ours}.down"] = llama[f"{theirs}.mlp.down_proj.weight"].T.contiguous()
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything was done with the module: import, export, training on four ranks, export."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("own")
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.001}
    random_hf.save_random("Llama", {**sizes, **heads, **rope, "tie_word_embeddings": False}, folder / "llama")
    (folder / "acorn").mkdir()
    save_file(acorn(load_file(folder / "llama" / "model.safetensors")), folder / "acorn" / "model.safetensors")
    config = {**sizes, **heads, "architectures": ["AcornForCausalLM"], "acorn_eps": 0.001, "rope_theta": 500.0}
    (folder / "acorn" / "config.json").write_text(json.dumps(config))
    (folder / "acorn.yaml").write_text(JOB.format(name="acorn", family="acorn", keys="", init="start"))
    (folder / "llama.yaml").write_text(JOB.format(name="llama", family="llama", keys=LLAMA_KEYS, init="llama"))
    shutil.copy(ROOT / "tests" / "models" / "hf" / "own_family.py", folder)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *COMMANDS], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.distributed
def test_import_and_export_give_back_the_same_bits(work: Path) -> None:
    before, after = (load_file(work / name / "model.safetensors") for name in ("acorn", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((work / "back" / "config.json").read_text())
    assert config["architectures"] == ["AcornForCausalLM"]
    assert (config["model_type"], config["acorn_eps"], config["rope_theta"]) == ("acorn", 0.001, 500.0)


@pytest.mark.distributed
def test_four_ranks_train_it_as_one_trains_the_same_llama(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    assert run_rank(["llama.yaml"]) == 0
    assert main(["export-hf", "runs/llama", "trained-llama"]) == 0
    ours, theirs = (
        [json.loads(line) for line in (work / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("acorn", "llama")
    )
    losses = [row["loss"] for row in ours]
    assert losses == pytest.approx([row["loss"] for row in theirs], rel=1e-5) and len(losses) == 2
    assert [row["perplexity"] for row in ours] == [math.exp(loss) for loss in losses]  # the module's own metric
    last = json.loads((work / "runs" / "acorn" / "program.json").read_text())["ranks"][1]
    assert [op[:3] for op in last if op[0] in "FB"] == ["F0@", "F1@", "F2@", "F3@", "BW3", "BW2", "BW1", "BW0"]
    found, expected = (
        load_file(work / "trained" / "model.safetensors"),
        acorn(load_file(work / "trained-llama" / "model.safetensors")),
    )
    start = load_file(work / "acorn" / "model.safetensors")
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() < 1e-3 * (tensor - start[name]).norm(), name


@pytest.mark.distributed
def test_who_goes_on_without_the_module_is_told_which(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    told = "model.family: 'acorn' is not known; the run was started with --import own_family; give it again"
    for command in (
        "train acorn.yaml parallel.tp=2 parallel.pp=2 checkpoint.resume=latest checkpoint.init=null",
        "check acorn.yaml",
        "export-hf runs/acorn nowhere",
        "generate runs/acorn --prompt a",
    ):
        assert main(command.split()) == 2, command
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and told in lines[0], command
    assert main(["import-hf", "acorn", "nowhere"]) == 2
    assert "['AcornForCausalLM'] is not supported, only LlamaForCausalLM" in (said := capfd.readouterr().err)
    assert "or one that --import MODULE brings" in said
    assert not (work / "nowhere").exists()
    assert "# " in (work / "runs" / "acorn" / "config.yaml").read_text().partition("--import own_family")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--import broken: there is no module broken here or on Python's path"),
        ("import lost_one", "--import broken: cannot be imported: ModuleNotFoundError: No module named 'lost_one'"),
        ("x = 1 / 0", "--import broken: cannot be imported: ZeroDivisionError: division by zero"),
        ("def", "--import broken: cannot be imported: SyntaxError"),
        ("raise SystemExit(0)", "--import broken: cannot be imported: SystemExit: 0"),
        (
            "from pentad.models.hf.families import *\nllama = find_family('llama')\n"
            "register(Family(name='llama', architecture='A', read=llama.read, write=llama.write))",
            "--import broken: family llama: there is one of this name already",
        ),
    ],
)
@pytest.mark.parametrize("start", ["cli", "rank"])
def test_a_module_that_cannot_be_imported_is_one_line(
    text: str | None,
    message: str,
    start: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    run = main if start == "cli" else run_rank
    arguments = ["--import", "broken", "demo"]
    assert run(["train", *arguments] if start == "cli" else arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}"), lines
    assert not (tmp_path / "runs").exists()


def test_a_config_file_imports_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("import: own_family\nimports: [own_family]\n")
    assert main(["check", str(tmp_path / "job.yaml"), "model.preset=llama3_8b"]) == 2
    assert "unknown key" in capfd.readouterr().err
