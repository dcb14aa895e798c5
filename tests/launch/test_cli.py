"""The command line in process: exit codes, one line per problem, what each verb prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pentad.configs import load
from pentad.launch.cli import main
from pentad.launch.verbs.check import check
from pentad.trainer.memory.estimate import per_rank
from tests.jobs import DENSE


@pytest.fixture(autouse=True)
def _no_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nobody has run anything yet: `check` warns of a folder that holds a run."""
    monkeypatch.chdir(tmp_path)


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "which command"),
        (("trian", "demo"), "did you mean train?"),
        (("frobnicate",), "one of train, check, show"),
        (("train",), "CONFIG"),
        (("train", "no-such.yaml"), "no such file"),
        (("check", "dmo"), "did you mean demo?"),
        (("show",), "show needs a CONFIG, or --keys SECTION"),
        (("show", "demo", "--lr=3"), "config keys are given as key=value"),
        (("show", "--keys", "optimm"), "did you mean optim?"),
        (("show", "demo", "train.stesp=3"), "did you mean train.steps?"),
        (("train", "demo", "parallel.tp=3"), "parallel.tp=3"),
        (("flops", "llama3_8b"), "--seq-len"),
        (("flops", "llama3_8b", "--seq-len", "long"), "--seq-len"),
        (("flops", "llama3_9b", "--seq-len", "8"), "did you mean llama3_8b?"),
        (("flops", "llama3_8b", "--seq-len", "0"), "must be at least 1"),
        (("export-hf", "nowhere", "out"), "nowhere"),
        (("import-hf", "nowhere", "out"), "nowhere"),
        (("tokenize", "nowhere.txt", "--tokenizer", "byte", "--out", "x"), "nowhere.txt"),
        (("tokenize", "x.txt", "--out", "x"), "--tokenizer"),
        (("export-hf", "a", "b", "--dtype", "int8"), "int8"),
    ],
)
def test_mistakes_are_lines_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], expected: str
) -> None:
    code, out, err = _run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err
    assert all(line.startswith("error: ") for line in err)
    assert any(expected in line for line in err)


def test_all_problems_are_printed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "train", "demo", "train.stesp=3", "optim.lr=fast", "parallel.tp=3", "data.nam=text")
    assert code == 2
    for key in ("train.stesp", "optim.lr", "parallel.tp", "data.nam"):
        assert sum(key in line for line in err) >= 1, err


def test_show_round_trips(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = _run(capsys, "show", "demo", "train.steps=77", "optim.schedule.name=linear")
    assert (code, err) == (0, [])
    file = tmp_path / "shown.yaml"
    file.write_text(out)
    assert load(file) == load("demo", ["train.steps=77", "optim.schedule.name=linear"])


def test_show_keys(capsys: pytest.CaptureFixture[str]) -> None:
    _, section, _ = _run(capsys, "show", "--keys", "eval")
    assert "eval.every  int  = 0" in section
    assert "train.steps" not in section
    code, everything, _ = _run(capsys, "show", "--keys")
    assert code == 0
    assert "train.steps" in everything and "eval.every" in everything


def test_flops_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "flops", "llama3_8b", "--seq-len", "8192", "--json")
    assert code == 0
    result = json.loads(out)
    keys = {"params_total", "params_active", "flops_per_token", "flops_per_token_full_attention", "convention"}
    assert keys <= set(result)
    assert result["params_total"] == 8_030_261_248
    code, out, _ = _run(capsys, "flops", "llama3_8b", "--seq-len", "8192")
    assert code == 0
    assert "8,030,261,248" in out and "51.47 GFLOP" in out


def test_check_prints_layout_parameters_flops_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "check", DENSE, "train.global_batch=16", "train.micro_batch=2")
    assert (code, err) == (0, [])
    assert "tp 2 × cp 1 × dp 2 × pp 1 = 4" in out
    assert "16 sequences = 2 dp × 4 microbatches × 2 sequences" in out
    assert "3,115,264" in out
    assert "unmasked attention" in out and "full attention" in out
    assert "activations" in out and "total" in out


def test_check_prints_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ["parallel.pp=2", "parallel.pipeline.chunks=2", "parallel.pipeline.vocab=balanced"]
    code, out, err = _run(capsys, "check", DENSE, *pipeline, "train.global_batch=32")
    assert (code, err) == (0, [])
    assert "tp 2 × cp 1 × dp 2 × pp 2 = 8" in out
    for text in ("gis, 2 chunks per rank", "1 1 1 1", "balanced, 1 barrier", "rank 0", "rank 1"):
        assert text in out, text
    assert "microbatches in flight" in out and "selective: ffn" in out


def test_check_compares_with_the_memory_of_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "check", "demo", "name=unused", "hardware.memory_gib=0.01")
    assert code == 2
    assert "available" in out and "working memory" in out  # the tables show where the memory goes
    assert len(err) == 1 and err[0].startswith("error: hardware.memory_gib: 0.01, but about 0.04")
    assert _run(capsys, "check", "demo", "name=unused", "hardware.memory_gib=100")[::2] == (0, [])


def test_check_draws_the_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A bar for each rank, as long as its table says."""
    file = tmp_path / "memory.svg"
    job = [DENSE, "parallel.pp=2", "train.global_batch=32", "hardware.memory_gib=2", "train.device=cpu"]
    assert _run(capsys, "check", *job, "--svg", str(file))[::2] == (0, [])
    cfg = load(DENSE, job[1:])
    picture = ElementTree.fromstring(file.read_text())
    bars: dict[str, float] = defaultdict(float)
    for rect in picture.iter("{http://www.w3.org/2000/svg}rect"):
        tip = rect.find("{http://www.w3.org/2000/svg}title")
        if tip is not None:
            bars[rect.attrib["y"]] += float(rect.attrib["width"])
    totals = [memory.total for memory in per_rank(cfg)]
    first, second = bars.values()
    assert first / second == pytest.approx(totals[0] / totals[1], rel=0.01)
    assert "2 GiB" in file.read_text()
    code, _, err = _run(capsys, "check", *job, "--svg", str(tmp_path / "none" / "memory.svg"))
    assert code == 2 and "--svg" in err[0] and "No such file" in err[0]


def test_train_refuses_what_check_refuses_for_its_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = _run(capsys, "train", "demo", "hardware.memory_gib=0.01", f"runs_dir={tmp_path}")
    assert (code, out) == (2, "")
    assert len(err) == 1 and err[0].startswith("error: hardware.memory_gib: 0.01, but about 0.04")
    assert not list(tmp_path.iterdir())


def test_check_prints_the_expert_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    check(DENSE, ["model.moe.experts=8", "parallel.ep=2", "parallel.pp=2", "parallel.dp=4", "train.micro_batch=1"])
    out = capsys.readouterr().out
    for shown in ("etp 1 × ep 2 × edp 4 = 8 of each stage", "8, 2 per token, in 4 of 4 layers, 4 on a rank"):
        assert shown in out
    assert "in experts)" in out and "sharded over 4" in out
    check(DENSE, [])
    assert "experts" not in capsys.readouterr().out.partition("FLOPs:")[0]


def test_tokenize_writes_bin_and_idx(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello")
    code, out, _ = _run(capsys, "tokenize", str(text), "--tokenizer", "byte", "--out", str(tmp_path / "t"))
    assert code == 0
    assert "1 documents, 6 tokens" in out  # five bytes and the end of the document
    assert (tmp_path / "t.bin").exists() and (tmp_path / "t.idx").exists()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for verb in ("train", "check", "show", "flops", "tokenize", "import-hf", "export-hf", "schedule"):
        assert verb in out


def test_show_and_validation_do_not_import_torch() -> None:
    code = (
        "import sys; from pentad.launch.cli import main; main(['show', 'demo']); main(['train', 'demo', 'a=1']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
