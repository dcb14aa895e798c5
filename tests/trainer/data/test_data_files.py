"""Which files paths mean: links followed, each real file once, and nothing left out without a word."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pentad.configs.errors import UserError
from pentad.trainer.data import files as files_module
from pentad.trainer.data.files import file_kind, kind_notice, survey

LINE = b'{"text": "a"}\n'


def make(root: Path, *names: str, content: bytes = LINE) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def names(root: Path, paths: Sequence[str], kind: str | None) -> list[str]:
    return [file.relative_to(root).as_posix() for file in survey([str(root / path) for path in paths], kind).files]


def test_links_to_folders_and_files_are_followed_and_each_real_file_counts_once(tmp_path: Path) -> None:
    make(tmp_path, "corpus/1.jsonl", "elsewhere/2.jsonl", "elsewhere/deep/3.jsonl", "single.jsonl")
    (tmp_path / "corpus/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/again").symlink_to("link")
    (tmp_path / "corpus/0.jsonl").symlink_to(tmp_path / "single.jsonl")
    (tmp_path / "corpus/copy.jsonl").symlink_to("1.jsonl")
    wanted = ["corpus/0.jsonl", "corpus/1.jsonl", "corpus/again/2.jsonl", "corpus/again/deep/3.jsonl"]
    assert names(tmp_path, ["corpus"], "jsonl") == wanted
    assert sorted(names(tmp_path, ["corpus/**/*.jsonl"], "jsonl")) == sorted(wanted)
    assert names(tmp_path, ["single.jsonl", "corpus", "elsewhere"], "jsonl") == ["single.jsonl", *wanted[1:]]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    make(tmp_path, "corpus/a/1.jsonl", "corpus/b/2.jsonl")
    (tmp_path / "corpus/a/up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus/a/b").symlink_to("../b")
    (tmp_path / "corpus/b/a").symlink_to("../a")
    for paths in (["corpus"], ["corpus/**/*.jsonl"], ["corpus/**"]):
        found = survey([str(tmp_path / path) for path in paths], "jsonl").files
        assert sorted(os.path.realpath(file) for file in found) == [
            str(tmp_path / "corpus/a/1.jsonl"), str(tmp_path / "corpus/b/2.jsonl")
        ]  # fmt: skip


def test_what_cannot_be_read_is_an_error_never_less_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "c/good.jsonl", "c/shut.jsonl", "c/closed/x.jsonl", "c/other.csv")
    (tmp_path / "c/gone.jsonl").symlink_to("nowhere")
    (tmp_path / "c/self").symlink_to("self")
    os.mkfifo(tmp_path / "c/pipe.jsonl")
    os.mkfifo(tmp_path / "c/pipe.csv")
    listed, readable = os.listdir, os.access

    def listdir(path: Path) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(files_module.os, "listdir", listdir)
    monkeypatch.setattr(
        files_module.os, "access", lambda path, mode: Path(path).name != "shut.jsonl" and readable(path, mode)
    )
    for path in ("c", "c/**", "c/**/*.jsonl"):
        with pytest.raises(UserError) as caught:
            survey([str(tmp_path / path)], "jsonl")
        lines = str(caught.value)
        assert f"cannot read folder {tmp_path}/c/closed: Permission denied" in lines
        assert f"broken link: {tmp_path}/c/gone.jsonl -> nowhere" in lines
        assert f"{tmp_path}/c/pipe.jsonl is not a regular file" in lines
        assert f"cannot read {tmp_path}/c/shut.jsonl: permission denied" in lines
        assert "good.jsonl" not in lines
        assert path != "c" or ("self" in lines and "csv" not in lines)


def test_folders_that_a_pattern_matches_are_searched_too(tmp_path: Path) -> None:
    make(tmp_path, "data/x/1.jsonl", "data/y/deep/2.jsonl", "data/3.jsonl", "data/.hidden/4.jsonl")
    assert names(tmp_path, ["data/*"], "jsonl") == ["data/3.jsonl", "data/x/1.jsonl", "data/y/deep/2.jsonl"]


def test_every_pattern_and_path_must_mean_something(tmp_path: Path) -> None:
    make(tmp_path, "c/1.jsonl", "[odd].jsonl")
    assert names(tmp_path, ["[odd].jsonl"], "jsonl") == ["[odd].jsonl"]
    with pytest.raises(UserError) as caught:
        survey([str(tmp_path / "c"), str(tmp_path / "*.nope"), "", str(tmp_path / "c" / "2.jsonl")], "jsonl")
    lines = str(caught.value).splitlines()
    assert [line.split(": ", 1)[1].split(" ")[:3] for line in lines] == [
        ["no", "file", "matches"], ["an", "empty", "path;"], ["no", "such", "file"]
    ]  # fmt: skip


def test_a_folder_gives_files_of_data_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    make(tmp_path, "c/part-00000", "c/b.JSONL", "c/c.json.gz", "c/shard.0001", "c/d.TXT", "c/_SUCCESS.txt")
    make(tmp_path, "c/README.md", "c/LICENSE", "c/readme.txt", "c/.DS_Store", "c/x.csv", content=b"words\n")
    make(tmp_path, "c/_SUCCESS", "c/empty.jsonl", content=b"")
    make(tmp_path, "c/table", content=b"PAR1...")
    auto = survey([str(tmp_path / "c")])
    taken = ["_SUCCESS.txt", "b.JSONL", "c.json.gz", "d.TXT", "empty.jsonl", "part-00000", "shard.0001", "table"]
    assert [file.name for file in auto.files] == taken
    assert auto.notices() == [
        "6 files left out, hidden or of another kind: .DS_Store, LICENSE, README.md, _SUCCESS, …",
        "1 file empty: empty.jsonl",
    ]
    assert names(tmp_path, ["c"], "jsonl") == [
        f"c/{name}" for name in ("b.JSONL", "c.json.gz", "empty.jsonl", "part-00000", "shard.0001")
    ]
    assert names(tmp_path, ["c"], "parquet") == ["c/table"]
    assert len(survey([str(tmp_path / "c")], "text").left_out) == 1


def test_kinds_go_by_suffix_and_then_by_content(tmp_path: Path) -> None:
    make(tmp_path, "a", "b.txt", "c.log")
    make(tmp_path, "blank", content=b"\n\n" + LINE)
    make(tmp_path, "bom", content=b"\xef\xbb\xbf" + LINE)
    make(tmp_path, "packed", content=gzip.compress(LINE))
    make(tmp_path, "list", content=b"[1]\n")
    make(tmp_path, "prose", content=b'{"text": "a"} is an object\n')
    make(tmp_path, "binary", content=b"\xff\xfe\0")
    found = {name: file_kind(tmp_path / name) for name in os.listdir(tmp_path)}
    jsonl = {"a", "blank", "bom", "packed", "c.log"}
    assert found == {name: "jsonl" if name in jsonl else "text" for name in found}
    assert kind_notice([tmp_path / "a", tmp_path / "blank"]) is None
    assert kind_notice([tmp_path / "a", tmp_path / "prose"]) == "mixed kinds: 1 jsonl (a); 1 text (prose)"


def test_json_lines_without_suffix_are_read_as_json_lines(tmp_path: Path) -> None:
    from pentad.trainer.data.documents import read_documents

    make(tmp_path, "part-00000", content=b"".join(json.dumps({"text": t}).encode() + b"\n" for t in "ab"))
    assert [document.text for document in read_documents([tmp_path / "part-00000"])] == ["a", "b"]
