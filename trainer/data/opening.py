"""Files of text opened for reading, compressed or not, and refused where they are no UTF-8 text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ...configs.errors import Problem, UserError

DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What reading a damaged compressed file raises, beside OSError."""
_GZIP, _XZ, _LZMA, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ\0", b"\x5d\0\0", b"\x28\xb5\x2f\xfd"
_BZIP2 = b"1AY&SY"
_TAR, _TAR_AT = b"ustar", 257
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32LE", codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE", codecs.BOM_UTF16_BE: "UTF-16BE",
}  # fmt: skip
_LONGEST_FIRST_LINE = 64 << 20
_NO_ZSTD = "reading zstandard needs the pyarrow package: pip install pyarrow, or decompress it with zstd -d"


@contextmanager
def open_text(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes of a text file, decompressed (gzip, bzip2, xz, zstandard, by content), without a byte order mark; and
    the file itself, whose position shows progress (the same object when it is not compressed).

    Raises UserError for archives and for other encodings than UTF-8; reading may raise `DAMAGE`.
    """
    with path.open("rb") as raw, _decompress(raw, path) as file:
        # Peeking reads no more than the buffer, which is large enough for a tar header.
        head = file.peek(512)[:512]
        if head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR or head.startswith(b"PK\3\4"):
            raise UserError(Problem("data.paths", f"{path} is an archive; unpack it and give the files in it"))
        for mark, name in _OTHER_ENCODINGS.items():
            if head.startswith(mark):
                way = f"iconv -f {name[:6]} -t UTF-8 turns it into UTF-8"
                raise UserError(Problem("data.paths", f"{path} is {name} text, not UTF-8; {way}"))
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        yield cast(BinaryIO, file), cast(BinaryIO, raw)


def _decompress(raw: io.BufferedReader, path: Path) -> io.BufferedReader:
    head = raw.peek(16)[:16]
    if head.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if head.startswith(b"BZh") and head[4:10] == _BZIP2:
        return io.BufferedReader(bz2.BZ2File(raw))
    if head.startswith(_XZ) or (path.suffix.lower() == ".lzma" and head.startswith(_LZMA)):
        return io.BufferedReader(lzma.LZMAFile(raw))
    if head.startswith(_ZSTD):
        try:
            import pyarrow
        except ImportError:
            raise UserError(Problem("data.paths", f"{path}: {_NO_ZSTD}")) from None
        return io.BufferedReader(cast(io.RawIOBase, pyarrow.CompressedInputStream(raw, "zstd")))
    return raw


def is_parquet(path: Path) -> bool:
    """Whether the file starts as parquet files do."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def first_object(path: Path) -> dict | None:
    """The JSON object that the first line with anything on it is, else None."""
    try:
        with open_text(path) as (file, _):
            while line := file.readline(_LONGEST_FIRST_LINE):
                if not line.isspace():
                    record = json.loads(line.decode("utf-8"))
                    return record if isinstance(record, dict) else None
    except (UserError, ValueError, RecursionError, *DAMAGE):
        return None  # whoever reads it says what is wrong with it
    return None
