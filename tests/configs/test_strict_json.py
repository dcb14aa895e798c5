"""JSON that Python's own reader would take, or die of, is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pentad.configs.strict_json import (
    JsonError,
    expect_file_name,
    expect_int,
    expect_list,
    expect_object,
    expect_text,
    parse_json,
    read_json,
)

REFUSED = {
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "Infinity": (b"[-Infinity]", "-Infinity"),
    "beyond a float": (b'{"a": 1e999}', "'1e999' is too large"),
    "a very long integer": (b"1" * 100_000, "no JSON"),
    "nested lists": (b"[" * 200_000 + b"]" * 200_000, "nested deeper"),
    "nested objects": (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper than 32"),
    "nothing": (b"", "no JSON"),
    "cut short": (b'{"a": [1, 2', "no JSON"),
    "something behind it": (b"{} {}", "no JSON"),
    "bytes that are no text": (b'{"a": "\xff"}', "UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "half a character": (b'{"a": "\\ud800"}', "UTF-8"),
    "half a character in a key": (b'{"\\uDC00": 1}', "UTF-8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_strict_json_is_refused_in_one_line(kind: str) -> None:
    data, reason = REFUSED[kind]
    with pytest.raises(JsonError) as error:
        parse_json(data)
    text = str(error.value)
    assert reason in text and "\n" not in text and len(text) < 200


def test_what_json_writes_comes_back() -> None:
    value = {"a": [1, -2.5, True, None, "é😀\n"], "b": {"c": {}}, "d": 2**63}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_json(b"[" * 32 + b"]" * 32) is not None


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    with pytest.raises(JsonError, match="more than 5 bytes"):
        read_json(file, max_bytes=5)
    (tmp_path / "link.json").symlink_to(file)
    with pytest.raises(JsonError, match="symbolic link"):
        read_json(tmp_path / "link.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(JsonError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


def test_values_of_another_type_or_range_are_refused() -> None:
    assert expect_int(5, "size", high=5) == 5 and expect_object({"a": 1}, "it", ["a"]) == {"a": 1}
    assert (
        expect_list([1], "it") == [1] and expect_text("x", "it") == "x" and expect_file_name("a.b-c", "it") == "a.b-c"
    )
    for wrong in (True, 5.0, "5", None, [5]):
        with pytest.raises(JsonError, match=r"size is .*, not an integer"):
            expect_int(wrong, "size")
    with pytest.raises(JsonError, match="size is -1, which is not between 0 and 9"):
        expect_int(-1, "size", high=9)
    with pytest.raises(JsonError, match="the manifest lacks files, format"):
        expect_object({"a": 1}, "the manifest", ["files", "a", "format"])
    for wrong in ([], "a", 1):
        with pytest.raises(JsonError, match="not an object"):
            expect_object(wrong, "it")
    with pytest.raises(JsonError, match="not a list"):
        expect_list({}, "it")
    for name in ("", ".", "..", "../a", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "a\x1b[2J", "x" * 300, 7):
        with pytest.raises(JsonError):
            expect_file_name(name, "a file")
