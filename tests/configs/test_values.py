"""The key's type decides how a value is read, in a file as on the command line: as meant, or a clear line."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from pentad.configs import Config, UserError, given_yaml, load, to_yaml
from pentad.configs.reading.written import flow, unquote

TINY = ["model.layers=2", "model.hidden=64", "model.heads=4", "model.ffn=128"]


def value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


# Key, as written on the command line, the value that a person means.
MEANT: list[tuple[str, str, Any]] = [
    ("name", "run #1", "run #1"),
    ("name", "a: b", "a: b"),
    ("name", "1:30", "1:30"),
    ("name", "010", "010"),
    ("name", "1_000", "1_000"),
    ("name", "no", "no"),
    ("name", "2024-01-01", "2024-01-01"),
    ("name", "{x}", "{x}"),
    ("name", "[x]", "[x]"),
    ("name", "- x", "- x"),
    ("name", "*x &y !z %w @v `u`", "*x &y !z %w @v `u`"),
    ("name", "'quoted'", "quoted"),
    ("name", '"quoted"', "quoted"),
    ("name", "it's", "it's"),
    ("name", "'a' and 'b'", "'a' and 'b'"),
    ("name", "'null'", "null"),
    ("data.tokenizer.eod", "[EOS]", "[EOS]"),
    ("data.tokenizer.eod", "<|eos|>", "<|eos|>"),
    ("data.tokenizer.eod", "'null'", "null"),
    ("data.tokenizer.eod", "null", None),
    ("train.steps", "010", 10),
    ("train.steps", "0009", 9),
    ("train.steps", "1_000", 1000),
    ("train.steps", "1e3", 1000),
    ("train.steps", "1.5E3", 1500),
    ("train.steps", "+7", 7),
    ("train.steps", "4.0", 4),
    ("train.steps", "'7'", 7),
    ("train.seed", "9007199254740993", 9007199254740993),  # a float would lose the last digit
    ("train.seed", "9223372036854775807", 2**63 - 1),
    ("optim.lr", "1e-3", 0.001),
    ("optim.lr", "1E-3", 0.001),
    ("optim.lr", ".5", 0.5),
    ("optim.lr", "010", 10.0),
    ("optim.lr", "1", 1.0),
    ("train.deterministic", "yes", True),
    ("train.deterministic", "Off", False),
    ("train.deterministic", "TRUE", True),
    ("train.deterministic", "'false'", False),
    ("log.profile", "[010, 1e1]", (10, 10)),
    ("log.profile", "7", (7,)),
    ("log.profile", "[]", ()),
    ("log.profile", "[1, 2,]", (1, 2)),
    ("parallel.pipeline.vocab_barriers", "2", 2),
    ("model.window", "~", None),
]


@pytest.mark.parametrize(("key", "text", "expected"), MEANT, ids=[f"{k}={t}" for k, t, _ in MEANT])
def test_overrides_are_read_by_the_type_of_their_key(key: str, text: str, expected: Any) -> None:
    found = value(load(None, [*TINY, f"{key}={text}"]), key)
    assert found == expected and type(found) is type(expected)


# Key, the text in a YAML file, the value that a person means.
IN_FILES: list[tuple[str, str, Any]] = [
    ("name", "no", "no"),
    ("name", "1:30", "1:30"),
    ("name", "010", "010"),
    ("name", "2024-01-01", "2024-01-01"),
    ("name", "'null'", "null"),
    ("train.steps", "010", 10),
    ("train.steps", "1_000", 1000),
    ("train.steps", "1e3", 1000),
    ("train.steps", "'1e3'", 1000),
    ("optim.lr", "1e-3", 0.001),
    ("optim.lr", "5e-1", 0.5),
    ("train.deterministic", "on", True),
    ("train.deterministic", "no", False),
    ("memory.recompute", "none", "none"),
    ("model.window", "", None),
    ("log.profile", "[010, 2]", (10, 2)),
    ("log.profile", "3", (3,)),
]


@pytest.mark.parametrize(("key", "text", "expected"), IN_FILES, ids=[f"{k}: {t}" for k, t, _ in IN_FILES])
def test_files_are_read_by_the_type_of_the_key(key: str, text: str, expected: Any, tmp_path: Path) -> None:
    *sections, leaf = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    (tmp_path / "job.yaml").write_text("\n".join([*lines, f"{'  ' * len(sections)}{leaf}: {text}"]) + "\n")
    found = value(load(tmp_path / "job.yaml", TINY), key)
    assert found == expected and type(found) is type(expected)


# What YAML 1.1 would silently take for another number, and what is none.
REFUSED: list[tuple[str, list[str]]] = [
    ("train.steps=1:30", ["an integer", "'1:30'", "write one number"]),
    ("train.steps=0x10", ["an integer", "decimal"]),
    ("train.steps=0b11", ["an integer", "decimal"]),
    ("train.steps=0o17", ["an integer", "decimal"]),
    ("train.steps=1,000", ["without a comma"]),
    ("train.steps=1__0", ["an integer"]),
    ("train.steps=1e", ["an integer"]),
    ("train.steps=e3", ["an integer"]),
    ("train.steps=1e-1", ["an integer"]),
    ("train.steps=1e400", ["too large"]),
    ("train.steps=1e9999", ["too large"]),
    ("train.steps=inf", ["an integer"]),
    ("train.steps=yes", ["an integer"]),
    ("train.steps=10 # ten", ["an integer"]),
    ("train.steps=١٠", ["an integer", "ARABIC-INDIC DIGIT ONE"]),
    ("train.steps=−5", ["an integer", "MINUS SIGN"]),
    ("train.steps=10\u00a0000", ["an integer", "NO-BREAK SPACE"]),
    ("train.seed=9223372036854775808", ["the largest is 9223372036854775807"]),
    ("optim.lr=1:30.5", ["a number", "write one number"]),
    ("optim.lr=1/3", ["a number"]),
    ("optim.lr=3e-4f", ["a number"]),
    ("optim.lr=0,1", ["with a point"]),
    ("optim.lr=10%", ["a number"]),
    ("train.deterministic=2", ["true or false"]),
    ("train.deterministic=", ["has no value", "train.deterministic=VALUE"]),
    ("checkpoint.resume=", ["has no value", "null for none"]),
    ("checkpoint.resume=~", ["~/ for the home folder"]),
    ("log.profile=1,2", ["lists in brackets, [1, 2]"]),
    ("log.profile=[1, [2]]", ["a list of integers"]),
    ("log.profile=[1,,2]", ["nothing between two commas"]),
    ("optim={name sgd}", ["'name sgd' is not `key: value`"]),
    ("train.dtyp\u0435=fp32", ["did you mean train.dtype?", "CYRILLIC SMALL LETTER IE"]),
    ("train.dtype=fp3\u0032\u0301", ["COMBINING ACUTE ACCENT"]),
    ("train:steps=4", ["a space behind the colon"]),
]


@pytest.mark.parametrize(("override", "fragments"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_could_be_misread_is_one_clear_line(override: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [*TINY, override])
    (problem,) = caught.value.problems
    for fragment in fragments:
        assert fragment in str(problem)


def test_paths_of_an_override_need_no_quotes(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b #1.jsonl", "c,d.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    jsonl = [*TINY, "data.name=jsonl"]

    def paths(text: str) -> object:
        return getattr(load(None, [*jsonl, f"data.paths={text}"]).data, "paths", None)

    assert paths(f"{tmp_path}/*.jsonl") == (f"{tmp_path}/*.jsonl",)
    assert paths(f"[{tmp_path}/b #1.jsonl, {tmp_path}/*.jsonl]") == (f"{tmp_path}/b #1.jsonl", f"{tmp_path}/*.jsonl")
    assert paths(f"{tmp_path}/c,d.jsonl") == (f"{tmp_path}/c,d.jsonl",)
    assert paths(f"['{tmp_path}/c,d.jsonl']") == (f"{tmp_path}/c,d.jsonl",)


def test_flow_syntax() -> None:
    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(e) for e in node]
        return {k: plain(v) for k, v in node.items()} if isinstance(node, dict) else node.text

    assert plain(flow("[*.jsonl, a#b, <|eos|>, 'x, y', \"]\"]")) == ["*.jsonl", "a#b", "<|eos|>", "x, y", "]"]
    assert plain(flow("{a: 1, b: {c: [2, 3]}, 'd: e': f, C:/x: 4, g:5}")) == {
        "a": "1", "b": {"c": ["2", "3"]}, "d: e": "f", "C:/x": "4", "g": "5",
    }  # fmt: skip
    assert plain(flow("[${oc.env:A,b}, ${c}]")) == ["${oc.env:A,b}", "${c}"]
    assert plain(flow("[don't, won't]")) == ["don't", "won't"]
    assert unquote("'it''s'").text == "it's" and not unquote("'a' 'b'").quoted


@pytest.mark.parametrize(
    ("text", "line", "fragment"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", ":3", "duplicate key steps, first on line 2"),
        ("train:\n  steps: 1\ntrain.steps: 2\n", ":3", "duplicate key train.steps, first on line 2"),
        ("train: {seed: 1}\nname: x\ntrain: {steps: 2}\n", ":3", "duplicate key train"),
        ("train:\n\tsteps: 1\n", ":2", "indent with spaces, not tabs"),
        ("[a, b]: 1\n", ":1", "a key must be a single text"),
        ("? {a: 1}\n: 1\n", ":1", "a key must be a single text"),
        ("data: {paths: [*.jsonl]}\n", ":1", "put quotes around"),
        ("data: {paths: *.jsonl}\n", ":1", "put quotes around"),
        ("name: @x\n", ":1", "put quotes around"),
        ("name: a: b\n", ":1", "put quotes around"),
        ("name: !!python/object/apply:os.system [echo]\n", ":1", "the tag"),
        ("name: !!int 3\n", ":1", "the tag"),
        ("train: !x {steps: 1}\n", ":1", "the tag"),
        ("name: x\n---\nname: y\n", ":2", "single document"),
        ("a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b]\n<<: 3\n", ":4", "<< takes a mapping"),
        ("a: &x {b: *x}\n", ":1", "contains itself"),
        ("a: &x [*x]\n", ":1", "contains itself"),
    ],
)
def test_files_that_would_lose_or_guess_something(tmp_path: Path, text: str, line: str, fragment: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(UserError) as caught:
        load(job)
    (problem,) = caught.value.problems
    assert problem.key == f"{job}{line}" and fragment in problem.message and "\n" not in str(problem)


def test_aliases_that_multiply_and_depth_without_end(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    job.write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 20000 values"):
        load(job)
    job.write_text("\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))]))
    with pytest.raises(UserError, match=r"nested too deeply|more than 20000 values"):
        load(job)
    for text in ("[" * 5000 + "]" * 5000, "{a: " * 2000 + "}" * 2000):
        with pytest.raises(UserError, match="nested too deeply"):
            load(None, [*TINY, f"log.profile={text}"])
    with pytest.raises(UserError, match="cannot be resolved"):
        load(None, [*TINY, f"name={'${oc.env:' * 2000}x{'}' * 2000}"])
    job.write_text("a: " + "[" * 20000 + "]" * 20000)
    with pytest.raises(UserError, match="nested too deeply"):
        load(job)
    job.write_text("name: " + "x" * (5 << 20))
    with pytest.raises(UserError, match="has 5 MiB"):
        load(job)


def test_anchors_and_merge_keys_are_read(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: &m {layers: 2, hidden: 64, heads: 4, ffn: 128}\n"
        "optim:\n  lr: &rate 1e-3\n  schedule: {min_ratio: *rate}\n"
    )
    config = load(job)
    assert (config.model.hidden, config.optim.lr, value(config, "optim.schedule.min_ratio")) == (64, 0.001, 0.001)
    job.write_text("model:\n  <<: {layers: 2, hidden: 32}\n  hidden: 64\n  heads: 4\n  ffn: 128\n")
    assert (load(job).model.layers, load(job).model.hidden) == (2, 64)


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path, prefix: bytes, newline: bytes) -> None:
    job = tmp_path / "job.yaml"
    text = "name: mark\nmodel: {layers: 2, hidden: 64, heads: 4, ffn: 128}\ntrain:\n  steps: 3\n"
    job.write_bytes(prefix + text.encode().replace(b"\n", newline))
    config = load(job)
    assert (config.name, config.train.steps) == ("mark", 3)
    (tmp_path / "copy.yaml").write_text(given_yaml(job))
    assert load(tmp_path / "copy.yaml") == config


def test_files_in_another_encoding_and_empty_ones(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_bytes("name: x\n".encode("utf-16"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        load(job)
    for text in ("", "# nothing\n", "---\n", "train:\nmodel: {}\n"):
        job.write_text(text)
        assert load(job, TINY) == load(None, TINY)


def test_keys_that_are_no_text_are_unknown_keys(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("1: x\ntrue: y\nnull: z\nmodel: {layers: 2, hidden: 64, heads: 4, ffn: 128, 3: 4}\n")
    with pytest.raises(UserError) as caught:
        load(job)
    assert [p.key for p in caught.value.problems] == ["1", "true", "null", "model.3"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("${oc.env:PENTAD_NO_SUCH}", "Environment variable 'PENTAD_NO_SUCH' not found"),
        ("${nope:x}", "Unsupported interpolation type nope"),
        ("${no.such.key}", "not found"),
        ("${oops", "cannot be resolved"),
        ("${name}", "refers to itself"),
        ("${log.wandb_project}", "refers to itself"),
    ],
)
def test_interpolations_that_lead_nowhere(text: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [*TINY, f"name={text}", "log.wandb_project=${name}"])
    line = next(str(p) for p in caught.value.problems if p.key == "name")
    assert "cannot be resolved" in line and reason in line


def test_values_that_refer_to_others_follow_the_type_of_their_own_key() -> None:
    overrides = ["train.global_batch=1e1", "train.micro_batch=${train.global_batch}", "name=b${train.global_batch}"]
    config = load(None, [*TINY, *overrides])
    assert (config.train.micro_batch, config.name) == (10, "b10")


def test_resolved_yaml_is_plain_yaml() -> None:
    text = to_yaml(load(None, [*TINY, "name=010", "log.wandb_project=null and void", "data.tokenizer.eod='~'"]))
    tree = yaml.safe_load(text)
    assert (tree["name"], tree["train"]["steps"], tree["data"]["tokenizer"]["eod"]) == ("010", 1000, "~")
    assert "origin" not in tree
