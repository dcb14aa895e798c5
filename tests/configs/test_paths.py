"""Paths mean what the user sees: home folders, brackets in names, suffixes of prefixes, folders of tokenizers."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import get_args

import pytest

from pentad.configs import UserError, load, to_yaml
from pentad.configs.fields import SELECTORS, flatten_schema, is_mapping, optional
from pentad.configs.paths import PATHS, find_paths
from pentad.configs.tables.named import named

TINY = ["model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128", "model.vocab=320"]

NOT_PATHS = {
    "name", "model.preset", "hardware.preset", "optim.name", "data.name", "data.tokenizer.eod", "data.field",
    "log.wandb_project", "eval.prompts", "faults.layouts", "memory.recompute_parts",
}  # fmt: skip
"""Texts that are not paths. A new text belongs here or into PATHS."""


def test_every_text_of_the_schema_is_known_to_be_a_path_or_none() -> None:
    texts: set[str] = set()
    for section, (registry, _) in SELECTORS.items():
        for cls in registry.values():
            for key, annotation in flatten_schema({section: cls})[0].items():
                inner, _ = optional(annotation)
                mark = named(inner)
                if inner is str or is_mapping(inner) or (mark.file if mark else str in get_args(inner)):
                    texts.add(key)
    assert texts - NOT_PATHS == set(PATHS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.bin", "a.idx", "b.bin", "b.idx", "text.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "init").mkdir()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["runs_dir=~/runs"], "runs_dir", "{home}/runs"),
        (["runs_dir=~/runs"], "checkpoint.dir", "{home}/runs/run/checkpoints"),
        (["checkpoint.dir=~/c"], "checkpoint.dir", "{home}/c"),
        (["checkpoint.init=~/init"], "checkpoint.init", "{home}/init"),
        (["checkpoint.resume=~/init"], "checkpoint.resume", "{home}/init"),
        (["checkpoint.resume=latest"], "checkpoint.resume", "latest"),
        (["data.cache=~/cache"], "data.cache", "{home}/cache"),
        (["data.tokenizer.path=~/tokenizer.json"], "data.tokenizer.path", "{home}/tokenizer.json"),
        (["data.tokenizer.path=~"], "data.tokenizer.path", None),
        (["data.tokenizer.path=~/"], "data.tokenizer.path", "{home}/tokenizer.json"),
        (["data.name=text", "data.paths=[~/text.txt, ~/*.txt]"], "data.paths", ("{home}/text.txt", "{home}/*.txt")),
        (["data.name=bin", "data.paths=[~/a, ~/b.bin]"], "data.paths", ("{home}/a", "{home}/b")),
        (["data.name=blend", "data.weights={~/a: 1, ~/b.idx: 2}"], "data.weights", {"{home}/a": 1.0, "{home}/b": 2.0}),
    ],
)
def test_home_folders_and_suffixes_are_written_out_once(
    overrides: list[str], key: str, expected: object, home: Path, tmp_path: Path
) -> None:
    if overrides == ["data.tokenizer.path=~"]:
        with pytest.raises(UserError, match="~/ for the home folder"):
            load(None, [*TINY, *overrides])
        return
    config = load(None, [*TINY, *overrides])
    wanted = eval(repr(expected).replace("{home}", str(home)))
    assert reduce(getattr, key.split("."), config) == wanted
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("key", ["runs_dir", "checkpoint.dir", "data.cache", "checkpoint.init"])
def test_the_home_of_nobody_is_a_mistake(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}: ~nobody-like-that/x is the home folder of a user who is not known"):
        load(None, [*TINY, f"{key}=~nobody-like-that/x"])


def test_brackets_in_names_are_names_where_they_exist(tmp_path: Path) -> None:
    folder = tmp_path / "v[1] {x} *"
    folder.mkdir()
    (folder / "a[0].txt").write_text("x")
    (folder / "b.txt").write_text("x")
    text = [*TINY, "data.name=text"]
    for path in (folder, folder / "a[0].txt", folder / "*.txt", folder / "[ab]*.txt", tmp_path / "v*/b.txt"):
        config = load(None, [*text, f"data.paths={path}"])
        assert getattr(config.data, "paths", None) == (str(path),)
    assert find_paths(str(folder / "*.txt")) == [str(folder / "a[0].txt"), str(folder / "b.txt")]
    assert find_paths(str(folder / "[b]*.txt")) == [str(folder / "b.txt")]
    assert find_paths(str(folder / "a[0].txt")) == [str(folder / "a[0].txt")]
    assert find_paths(str(folder / "a[1].txt")) == []


def test_a_missing_file_never_suggests_itself(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    text = [*TINY, "data.name=text"]

    def message(path: object) -> str:
        with pytest.raises(UserError) as caught:
            load(None, [*text, f"data.paths={path}"])
        return str(caught.value)

    assert f"did you mean {tmp_path}/corpus.txt?" in message(f"{tmp_path}/corpsu.txt")
    assert f"there is no folder {tmp_path}/nowhere" in message(f"{tmp_path}/nowhere/corpus.txt")
    both = f"{tmp_path}/corpus.txt,{tmp_path}/corpus.txt"
    assert f"write data.paths=[{tmp_path}/corpus.txt, {tmp_path}/corpus.txt]" in message(both)
    assert "no such file" in message("x" * 5000)
    assert "'' is no path" in message("''")


def test_prefixes_with_suffix(tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx", "b.bin.bin", "b.bin.idx", "b.bin"):
        (tmp_path / name).write_text("x")
    binary = [*TINY, "data.name=bin"]
    assert getattr(load(None, [*binary, f"data.paths={tmp_path}/a.bin"]).data, "paths", None) == (f"{tmp_path}/a",)
    assert getattr(load(None, [*binary, f"data.paths={tmp_path}/b.bin"]).data, "paths", None) == (f"{tmp_path}/b.bin",)
    with pytest.raises(UserError, match=r"no such file: .*/c\.bin\.bin"):
        load(None, [*binary, f"data.paths={tmp_path}/c.bin"])


def test_a_tokenizer_folder_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without tokenizer\.json"):
        load(None, [*TINY, f"data.tokenizer.path={tmp_path}"])
