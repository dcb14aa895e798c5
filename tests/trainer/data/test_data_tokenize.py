"""`pentad tokenize`: what it writes and says, with any number of processes; and what jobs learn from it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pentad.configs import load
from pentad.configs.errors import UserError
from pentad.configs.schema import BinData, BlendData, JsonlData, TextData, TokenizerConfig
from pentad.configs.tokenized import read_meta
from pentad.launch.cli import main
from pentad.trainer.data import encode
from pentad.trainer.data.dataset import open_data
from pentad.trainer.data.indexed import IndexedReader
from pentad.trainer.data.tokenize import tokenize
from pentad.trainer.data.tokenizer import make_tokenizer
from pentad.trainer.text.tokenizer_files import of_job

VOCAB = {"hello": 0, "world": 1, "[UNK]": 2, "<|endoftext|>": 70000, "<s>": 5, "<pad>": 6}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCAB, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "hf").mkdir()
    backend.save(str(tmp_path / "hf" / "tokenizer.json"))
    return tmp_path / "hf"


def test_any_number_of_workers_writes_the_same(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARS", 500)
    lines = [json.dumps({"text": f"hello {i} world " * (i % 7)}) for i in range(400)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    written = []
    for workers in (1, 3):
        out = str(tmp_path / f"out{workers}")
        done = tokenize([str(tmp_path / "x.jsonl")], str(tokenizer), out, workers=workers, progress=False)
        assert (done.documents, done.left_out, done.largest) == (342, 58, 70000)
        written.append([Path(out + suffix).read_bytes() for suffix in (".bin", ".idx", ".meta.json")])
    assert written[0] == written[1]


def test_a_mistake_in_the_input_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARS", 1)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 30 + "{")
    with pytest.raises(UserError, match=r"INPUT: .*x.jsonl:31: not a JSON object"):
        tokenize([str(tmp_path / "x.jsonl")], "byte", str(tmp_path / "out"), workers=2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    with pytest.raises(UserError, match=r"--workers: at least 1 process is needed, got 0"):
        tokenize([str(tmp_path / "x.jsonl")], "byte", str(tmp_path / "out"), workers=0)


SLOW = """
import sys, time
from pentad.trainer.data import encode
from pentad.trainer.data.dataset import open_data
from pentad.trainer.data.tokenize import tokenize
encode._BATCH_CHARS = 1
make = encode.make_tokenizer
def slow(cfg):
    print("working", flush=True)
    time.sleep(600)
encode.make_tokenizer = slow
tokenize([sys.argv[1]], "byte", sys.argv[2], workers=2, progress=False)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 9)
    arguments = [sys.executable, "-c", SLOW, str(tmp_path / "x.jsonl"), str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        try:
            begun = parent.stdout.readline()
        finally:
            parent.send_signal(signal.SIGKILL)  # whatever was read: the worker would sleep for minutes
        # The pipe ends when nobody is left who could write to it.
        parent.stdout.read()
    assert "working" in begun
    assert not (tmp_path / "out.bin").exists()


def test_errors_name_the_options_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    x, out = str(tmp_path / "x.jsonl"), str(tmp_path / "out")
    cases = [
        ([x, "--tokenizer", str(tmp_path / "no.json"), "--out", out], "error: --tokenizer: no such file"),
        ([x, "--tokenizer", "byte", "--out", out, "--field", "body"], "error: --field: "),
        ([x, "--tokenizer", "byte", "--out", out, "--kind", "parquet"], "error: INPUT: "),
        ([str(tmp_path / "no"), "--tokenizer", "byte", "--out", out], "error: INPUT: no such file or folder"),
        ([x, "--tokenizer", "byte"], "error: the following arguments are required: --out"),
        ([x, "--tokenizer", "byte", "--out", f"{x}/out"], "error: --out: cannot write"),
        ([x, "--tokenizer", "byte", "--out", f"{tmp_path}/"], "error: --out: "),
        (["--verify", out], f"error: no such file: {out}.bin"),
    ]
    for arguments, message in cases:
        assert main(["tokenize", *arguments]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(message) and not said.out
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_kinds_by_content_or_as_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "part-00000").write_text('{"text": "a"}\n{"text": "b"}\n{"text": ""}\n')
    (corpus / "LICENSE").write_text("free")
    out = str(tmp_path / "out")
    assert main(["tokenize", str(corpus), "--tokenizer", "byte", "--out", out]) == 0
    said = capsys.readouterr()
    assert said.err == "1 file left out, hidden or of another kind: LICENSE\n"
    lines = said.out.splitlines()
    assert lines[1:] == [
        "vocabulary: 257 tokens of bytes, end of document 256; in out.meta.json",
        "documents left out, empty or null: 1",
    ]
    assert IndexedReader(out).tokens.tolist() == [97, 256, 98, 256]
    assert main(["tokenize", "--verify", out]) == 0
    assert capsys.readouterr().out == f"{out}: 2 documents, 4 tokens, as written\n"
    assert main(["tokenize", f"{corpus}/*", "--tokenizer", "byte", "--out", out]) == 0
    said = capsys.readouterr()
    assert said.err == "mixed kinds: 1 text (LICENSE); 1 jsonl (part-00000); --kind takes all as one\n"
    assert main(["tokenize", f"{corpus}/part*", "--tokenizer", "byte", "--out", out, "--kind", "text"]) == 0
    assert IndexedReader(out).documents == 1


def bin_job(tmp_path: Path, *overrides: str) -> int | None:
    given = ["model.vocab=null", "data.name=bin", f"data.paths=[{tmp_path / 'out'}]", *overrides]
    return load("demo", given).model.vocab


def test_a_job_on_tokenized_data_knows_its_vocabulary(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "x.txt").write_text("hello world " * 100)
    out = str(tmp_path / "out")
    tokenize([str(tmp_path / "x.txt")], str(tokenizer), out, progress=False)
    meta = read_meta(out)
    assert meta is not None
    assert (meta.coding.vocab, meta.coding.eod, meta.largest) == (70001, 70000, 70000)
    assert meta.coding.identity == make_tokenizer(TokenizerConfig(path=str(tokenizer))).identity
    assert bin_job(tmp_path) == 70016  # the next multiple of 64
    (tmp_path / "out.meta.json").unlink()
    assert bin_job(tmp_path, f"data.tokenizer.path={tokenizer}") == 70016
    with pytest.raises(
        UserError, match=r"model.vocab: missing, and data.name=bin has no tokenizer .*: no PREFIX.meta.json"
    ):
        bin_job(tmp_path)


def test_a_tokenizers_folder_is_as_good_as_its_file(tmp_path: Path, tokenizer: Path) -> None:
    by_file, by_folder = (make_tokenizer(TokenizerConfig(path=str(tokenizer / n))) for n in ("tokenizer.json", ""))
    assert (by_file.identity, by_file.vocab) == (by_folder.identity, by_folder.vocab)
    (tmp_path / "x.txt").write_text("hello world " * 100)
    text = ["data.name=text", f"data.paths=[{tmp_path / 'x.txt'}]", "model.vocab=null"]
    assert load("demo", [*text, f"data.tokenizer.path={tokenizer}"]).model.vocab == 70016
    with pytest.raises(UserError, match=r"data.tokenizer.path: .* is a folder without tokenizer.json"):
        load("demo", [*text, f"data.tokenizer.path={tmp_path}"])


def test_a_job_on_tokenized_data_keeps_the_tokenizer_that_made_it(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "x.txt").write_text("hello world " * 100)
    job = ["model.vocab=null", "data.name=bin", f"data.paths=[{tmp_path / 'out'}]"]
    tokenize([str(tmp_path / "x.txt")], "byte", str(tmp_path / "out"), progress=False)
    found = of_job(load("demo", job))
    assert (found.kind, found.stops) == ("byte", {256})
    tokenize([str(tmp_path / "x.txt")], str(tokenizer), str(tmp_path / "out"), eod="world", progress=False)
    found = of_job(load("demo", job))
    assert (found.kind, found.stops) == ("files", {1})
    assert found.files["tokenizer.json"] == (tokenizer / "tokenizer.json").read_bytes()
    (tokenizer / "tokenizer.json").write_text("{}")
    assert of_job(load("demo", job)).kind == "none"


def test_files_of_different_tokenizers_are_not_mixed(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "x.txt").write_text("hello world " * 100)
    text, by_file, by_bytes = str(tmp_path / "x.txt"), str(tmp_path / "f"), str(tmp_path / "b")
    tokenize([text], str(tokenizer), by_file, progress=False)
    tokenize([text], str(tokenizer), f"{by_file}2", eod="world", progress=False)
    tokenize([text], "byte", by_bytes, progress=False)
    open_data(BlendData(weights={by_file: 1.0, f"{by_file}2": 1.0}), seq_len=8, vocab=70001, seed=0)
    refused = rf"data.weights: {by_file} and {by_bytes} have different tokenizers"
    with pytest.raises(UserError, match=refused):
        open_data(BlendData(weights={by_file: 1.0, by_bytes: 1.0}), seq_len=8, vocab=70001, seed=0)
    mine = TokenizerConfig(path=str(tokenizer))
    open_data(BinData(paths=(by_file,), tokenizer=mine), seq_len=8, vocab=70001, seed=0)
    with pytest.raises(UserError, match=r"data.tokenizer.path: .*hf and .*b have different tokenizers"):
        open_data(BinData(paths=(by_bytes,), tokenizer=mine), seq_len=8, vocab=70001, seed=0)
    Path(f"{by_bytes}.meta.json").unlink()
    open_data(BlendData(weights={by_file: 1.0, by_bytes: 1.0}), seq_len=8, vocab=70001, seed=0)


def test_the_end_of_a_document_is_what_the_tokenizer_calls_the_end(tokenizer: Path) -> None:
    path = tokenizer / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "[END]"))
    with pytest.raises(UserError, match=r"data.tokenizer.eod: none of"):
        make_tokenizer(TokenizerConfig(path=str(tokenizer)))
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "[END]"}')
    assert make_tokenizer(TokenizerConfig(path=str(tokenizer))).eod == 70000
    assert make_tokenizer(TokenizerConfig(path=str(tokenizer), eod="world")).eod == 1


def test_json_lines_read_as_text_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": "' + "a" * 100 + '"}\n')
    (tmp_path / "part-0").write_text('{"text": "a"}\n')
    for name in ("x.jsonl", "part-0"):
        data = TextData(paths=(str(tmp_path / name),), cache=str(tmp_path / "cache"))
        open_data(data, seq_len=4, vocab=257, seed=0)
        said = capsys.readouterr().err
        assert said == f"data.paths: 1 file read as text although holding JSON lines (see the kind jsonl): {name}\n"
    data = JsonlData(paths=(str(tmp_path / "x.jsonl"),), cache=str(tmp_path / "cache"))
    open_data(data, seq_len=4, vocab=257, seed=0)
    assert capsys.readouterr().err == "data: documents left out, empty or null: 1\n"
