"""What is in files: encodings, compression, parquet columns, lines that are none."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pentad.configs.errors import UserError
from pentad.trainer.data.documents import Tally, read_documents

TEXTS = ["héllo", "two\nlines", "☃" * 100]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts(path: Path, kind: str | None = None, tally: Tally | None = None) -> list[str]:
    return [document.text for document in read_documents([path], kind, tally=tally)]


def refusal(path: Path, content: bytes, kind: str | None = None) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts(path, kind)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(codecs.BOM_UTF8 + b"one \xef\xbb\xbftwo")
    assert texts(tmp_path / "x.txt") == ["one \ufefftwo"]
    (tmp_path / "x.jsonl").write_bytes(codecs.BOM_UTF8 + LINES)
    assert texts(tmp_path / "x.jsonl") == TEXTS
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + b"one"))
    assert texts(tmp_path / "x.txt.gz") == ["one"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_refused_by_name(tmp_path: Path, name: str, encoding: str) -> None:
    mark = getattr(codecs, "BOM_" + encoding.upper().replace("UTF-", "UTF").replace("-", "_"))
    said = refusal(tmp_path / name, mark + LINES.decode().encode(encoding))
    family = encoding[:6].upper()
    assert f"{name} is {family}{encoding[-2:].upper()} text, not UTF-8; iconv -f {family} -t UTF-8" in said


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    assert "x.txt is not UTF-8 text: byte 3 is 0xff" in refusal(tmp_path / "x.txt", b"abc\xff")
    assert "x.txt is not text: byte 1 is NUL" in refusal(tmp_path / "x.txt", "ab".encode("utf-16-le"))
    said = refusal(tmp_path / "x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert "x.jsonl:2: not UTF-8: byte 10 of the line is 0xe9" in said
    said = refusal(tmp_path / "x.jsonl", LINES + b"\0\0\0\0\0\0\0\0" + LINES)
    assert "x.jsonl:4: not JSON: byte 0 of the line is NUL" in said and "utf-32" not in said
    assert "x.json:1: not a JSON object: each needs a line of its own" in refusal(tmp_path / "x.json", b"[\n{}\n]\n")


def pack_zstd(data: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    return arrow.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zst": pack_zstd,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_hold_what_they_held(tmp_path: Path, suffix: str) -> None:
    packed, more = PACKERS[suffix](LINES), PACKERS[suffix](LINES[:-1])
    (tmp_path / f"x.jsonl.{suffix}").write_bytes(packed)
    (tmp_path / f"x.txt.{suffix}").write_bytes(PACKERS[suffix]("é".encode() * 70000))
    assert texts(tmp_path / f"x.jsonl.{suffix}") == TEXTS
    assert texts(tmp_path / f"x.txt.{suffix}") == ["é" * 70000]
    if suffix != "lzma":  # that format cannot be joined
        (tmp_path / f"y.jsonl.{suffix}").write_bytes(packed + more)
        assert texts(tmp_path / f"y.jsonl.{suffix}") == TEXTS * 2
    (tmp_path / "misnamed.jsonl").write_bytes(packed)
    assert suffix == "lzma" or texts(tmp_path / "misnamed.jsonl") == TEXTS
    (tmp_path / f"plain.jsonl.{suffix}").write_bytes(LINES)
    assert texts(tmp_path / f"plain.jsonl.{suffix}") == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_that_is_cut_or_damaged_is_refused(tmp_path: Path, suffix: str) -> None:
    body = "".join(json.dumps({"text": str(i * 7919)}) + "\n" for i in range(5000)).encode()
    packed = PACKERS[suffix](body)
    for keep in (len(packed) // 2, len(packed) - 1):
        assert f"x.jsonl.{suffix}" in refusal(tmp_path / f"x.jsonl.{suffix}", packed[:keep])
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 16
    if suffix not in ("lzma", "zst"):  # which have no checksum, or need none to be written
        assert "x.jsonl" in refusal(tmp_path / f"x.jsonl.{suffix}", bytes(flipped))


def test_archives_are_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo("x.jsonl")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES))
    assert "x.tar.gz is an archive; unpack it" in refusal(tmp_path / "x.tar.gz", out.getvalue())
    assert "x.zip is an archive; unpack it" in refusal(tmp_path / "x.zip", b"PK\3\4" + bytes(60))


def test_every_way_to_store_text_in_parquet_is_read(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    words = ["a", "é", None, "", "c"]
    raw = [None if word is None else word.encode() for word in words]
    columns = {
        "string": arrow.array(words),
        "large_string": arrow.array(words, arrow.large_string()),
        "string_view": arrow.array(words, arrow.string_view()),
        "binary": arrow.array(raw, arrow.binary()),
        "large_binary": arrow.array(raw, arrow.large_binary()),
        "binary_view": arrow.array(raw, arrow.binary_view()),
        "dictionary": arrow.array(words).dictionary_encode(),
        "dictionary of bytes": arrow.array(raw).dictionary_encode(),
    }
    for name, column in columns.items():
        parquet.write_table(arrow.table({"n": range(5), "text": column}), tmp_path / "x.parquet", row_group_size=2)
        tally = Tally()
        assert texts(tmp_path / "x.parquet", tally=tally) == ["a", "é", "c"], name
        assert tally.without_text == 2
    parquet.write_table(arrow.table({"text": arrow.nulls(3)}), tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet") == []
    parquet.write_table(arrow.table({"text": [b"fine", b"\xff"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet: row 2: column 'text' is not UTF-8: byte 0 is 0xff"):
        texts(tmp_path / "x.parquet")


def test_lines_without_text_are_counted_whichever_way_they_say_so(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": null}\n\n{"text": "a"}\n')
    tally = Tally()
    assert texts(tmp_path / "x.jsonl", tally=tally) == ["a"]
    assert tally.without_text == 2
