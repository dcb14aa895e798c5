"""Tokenizers, documents from files, the cache and `tokenize`."""

from __future__ import annotations

import json
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from pentad.configs.errors import UserError
from pentad.configs.schema import StdlibData, TokenizerConfig
from pentad.trainer.data import cache as cache_module
from pentad.trainer.data.cache import tokenize_cached
from pentad.trainer.data.dataset import open_data
from pentad.trainer.data.documents import read_documents
from pentad.trainer.data.files import stdlib_files, survey
from pentad.trainer.data.indexed import IndexedReader
from pentad.trainer.data.tokenize import tokenize
from pentad.trainer.data.tokenizer import ByteTokenizer, FileTokenizer, make_tokenizer
from pentad.trainer.metrics.notices import ProgressLine

TEXTS = ["héllo", "wörld\nof two lines", "", "third ☃"]


def write_tokenizer(path: Path, special: str = "<|endoftext|>") -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"hello": 0, "world": 1, "[UNK]": 2, special: 70000}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens([special])
    backend.enable_truncation(3)
    backend.save(str(path))
    return path


def test_byte_tokenizer() -> None:
    coder = make_tokenizer(TokenizerConfig())
    tokens = coder.encode("aé")
    assert (tokens.tolist(), coder.vocab, coder.eod) == ([97, 0xC3, 0xA9], 257, 256)
    assert coder.decode([97, 0xC3, 0xA9, 256]) == "aé"
    assert coder.encode("\ud800").tolist() == [ord("?")]


def test_file_tokenizer(tmp_path: Path) -> None:
    coder = make_tokenizer(TokenizerConfig(path=str(write_tokenizer(tmp_path / "tokenizer.json"))))
    assert (coder.vocab, coder.eod) == (70001, 70000)
    tokens = coder.encode("hello world hello planet \ud800")
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [0, 1, 0, 2, 2]
    assert coder.decode([0, 1]) == "hello world"


def test_file_tokenizer_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", special="[END]")
    with pytest.raises(UserError, match=r"data.tokenizer.eod: none of <\|endoftext\|>, "):
        FileTokenizer(str(path))
    with pytest.raises(UserError, match=r"'nope' is not a token of .*tokenizer.json"):
        FileTokenizer(str(path), "nope")
    assert FileTokenizer(str(path), "[END]").eod == 70000
    (tmp_path / "broken.json").write_text('{"model":')
    with pytest.raises(UserError, match=r"broken.json is not a valid tokenizer.json"):
        FileTokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(UserError, match=r"no such file: .*absent.json"):
        FileTokenizer(str(tmp_path / "absent.json"))
    assert FileTokenizer(str(tmp_path), "[END]").eod == 70000
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'pentad\[tokenizers\]'"):
        FileTokenizer(str(path), "[END]")


def texts(*paths: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(paths, field=field)]


def test_text_jsonl_and_parquet_hold_the_same_documents(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = "\n\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS))
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    parquet.write_table(arrow.table({"id": [0, 1, 2, 3], "body": TEXTS}), tmp_path / "x.parquet")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    wanted = [text for text in TEXTS if text]
    assert texts(*(tmp_path / f"{i}.txt" for i in range(4))) == wanted
    assert texts(tmp_path / "x.jsonl", field="body") == wanted
    assert texts(tmp_path / "x.parquet", field="body") == wanted
    outs = [tokenize([str(tmp_path / name)], "byte", str(tmp_path / "out" / name), field="body", progress=False)
            for name in ("*.txt", "x.jsonl", "x.parquet")]  # fmt: skip
    tokens = [IndexedReader(out.prefix).tokens.tolist() for out in outs]
    assert tokens[0] == tokens[1] == tokens[2] == list(chain(*([*text.encode(), 256] for text in wanted)))
    assert outs[0].documents == 3


BAD_LINES = {
    "{oops": r"x.jsonl:2: not valid JSON",
    "[1]": r"x.jsonl:2: a JSON object is needed, not list",
    '{"txt": "a"}': r"data.field: .*x.jsonl:2: no field 'text'; fields there: txt",
    '{"text": 5}': r"x.jsonl:2: field 'text' is int, not a string",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=BAD_LINES[line]):
        texts(tmp_path / "x.jsonl")


def test_bad_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"n": [1], "text": ["a"]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"y.parquet is not a readable parquet file"):
        texts(tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"no column 'body'; columns there: n, text"):
        texts(tmp_path / "x.parquet", field="body")
    with pytest.raises(UserError, match=r"column 'n' is int64, not a string"):
        texts(tmp_path / "x.parquet", field="n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install pyarrow"):
        texts(tmp_path / "x.parquet")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"x.txt is not UTF-8 text: byte 3 is 0xff"):
        texts(tmp_path / "x.txt")


def test_survey(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "b/.hidden", "b/notes.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*paths: str, kind: str) -> list[str]:
        found = survey([str(tmp_path / p) for p in paths], kind).files
        return [file.relative_to(tmp_path).as_posix() for file in found]

    assert names("b", kind="jsonl") == ["b/1.jsonl", "b/2.jsonl"]
    assert names("b", kind="text") == ["b/1.jsonl", "b/2.jsonl", "b/notes.txt"]
    assert names("b/2*", "b", "a.txt", kind="jsonl") == ["b/2.jsonl", "b/1.jsonl", "a.txt"]
    with pytest.raises(UserError) as caught:
        names("nope", "*.parquet", "b", kind="parquet")
    found = str(caught.value).splitlines()
    assert [line.split(": ", 1)[1].split(" ")[:3] for line in found] == [
        ["no", "such", "file"], ["no", "file", "matches"], ["no", "parquet", "files"]
    ]  # fmt: skip


def test_the_standard_library_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = stdlib_files()
    assert any(file.name == "argparse.py" for file in files)
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)
    cfg = StdlibData(cache=str(tmp_path))
    data = open_data(cfg, seq_len=128, vocab=257, seed=0)
    assert data.tokens > 4_000_000
    assert data.tokenizer is not None
    assert len(set(data.tokenizer.decode(data.train.batch(0, 0, global_batch=1, micro_batch=1).tokens[0].numpy()))) > 9
    monkeypatch.setattr(cache_module, "write_documents", None)
    assert open_data(cfg, seq_len=128, vocab=257, seed=0).fingerprint == data.fingerprint


def make_text(tmp_path: Path) -> list[Path]:
    (tmp_path / "x.txt").write_text("some text")
    return [tmp_path / "x.txt"]


def test_many_at_once_tokenize_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, calls, results = make_text(tmp_path), [], []
    original = cache_module.write_documents

    def slow(*args: object, **options: object) -> None:
        calls.append(1)
        time.sleep(0.3)
        original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "write_documents", slow)
    folder = tmp_path / "cache"

    def run() -> None:
        results.append(tokenize_cached(folder, ByteTokenizer(), files, "text", "", progress=False).tokens.tolist())

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(calls) == 1
    assert results == [[*b"some text", 256]] * 4


def test_a_changed_file_is_tokenized_again_and_a_damaged_cache_repaired(tmp_path: Path) -> None:
    files, folder = make_text(tmp_path), tmp_path / "cache"

    def tokens() -> bytes:
        reader = tokenize_cached(folder, ByteTokenizer(), files, "text", "", progress=False)
        return bytes(reader.tokens[:-1].astype(np.uint8))

    assert tokens() == b"some text"
    for index in folder.glob("*.idx"):
        index.write_bytes(index.read_bytes()[:30])
        (folder / f"{index.stem}.0123.tmp.bin").write_bytes(b"left by a process that was killed")
    assert tokens() == b"some text"
    assert not list(folder.glob("*.tmp.*"))
    files[0].write_text("other text")
    assert tokens() == b"other text"


def test_empty_text_and_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"data.paths: no text in 1 files"):
        tokenize_cached(tmp_path / "cache", ByteTokenizer(), [tmp_path / "x.txt"], "text", "", progress=False)
    with pytest.raises(UserError, match=r"INPUT: no text in 1 files"):
        tokenize([str(tmp_path / "x.txt")], "byte", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"data.cache: cannot write tokens to .*set data.cache"):
        tokenize_cached(tmp_path / "x.txt" / "cache", ByteTokenizer(), make_text(tmp_path), "text", "")
    assert not list(tmp_path.glob("out*"))


def test_tokenize_with_a_file_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    path = str(write_tokenizer(tmp_path / "tokenizer.json"))
    done = tokenize([str(tmp_path / "a.txt")], path, str(tmp_path / "out.bin"), progress=False)
    assert IndexedReader(done.prefix).tokens.tolist() == [0, 1, 70000]
    assert (done.documents, done.tokens, done.bytes) == (1, 3, 11)
    assert tokenize([str(tmp_path / "a.txt")], path, str(tmp_path / "o"), append_eod=False).tokens == 2


def test_progress_says_how_far(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: clock[0])
    said = ProgressLine("tokenizing x", 100e6)
    said.advance(10e6)
    assert capsys.readouterr().err == ""
    clock[0] = 5.0
    said.advance(15e6)
    assert capsys.readouterr().err == "tokenizing x: 25% of 100 MB, 5.0 MB/s, 15 s left\n"
