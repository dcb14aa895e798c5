"""Documents from files: the text in text, JSON lines and parquet files, in a fixed order.

A kind of file is a function and a row of `READERS`; a module outside the package adds one with `sources.register`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError
from .files import file_kind
from .opening import DAMAGE, open_text
from .parquet import read_parquet


@dataclass(frozen=True)
class Document:
    """One document's text, and how many bytes of input it stands for (for progress only)."""

    text: str
    size: float


Reader = Callable[[Path, str], Iterator[Document]]
"""(file, `data.field`) → its documents, in order."""


@dataclass
class Tally:
    """What was met while reading: documents without any text (or null), which are left out."""

    without_text: int = 0


def read_documents(
    files: Iterable[Path], kind: str | None = None, field: str = "text", tally: Tally | None = None
) -> Iterator[Document]:
    """Every document of `files` that has text, in order; the others are counted in `tally`.

    `kind` None goes by each file's suffix or, without one, its content. Raises UserError naming the file and the
    line, row or byte that cannot be read.
    """
    for path in files:
        try:
            for document in READERS[kind or file_kind(path)](path, field):
                if document.text:
                    yield document
                elif tally is not None:
                    tally.without_text += 1
        except DAMAGE as error:
            raise UserError(Problem("data.paths", f"{path} is damaged or cut short: {error}")) from None
        except OSError as error:
            raise UserError(Problem("data.paths", f"cannot read {path}: {error.strerror or error}")) from None


def _read_source(path: Path, field: str) -> Iterator[Document]:
    content = path.read_bytes()
    yield Document(content.decode("utf-8", errors="replace"), len(content))


def _read_text(path: Path, field: str) -> Iterator[Document]:
    with open_text(path) as (file, _):
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}"
        raise UserError(Problem("data.paths", message)) from None
    if "\0" in text:
        message = f"{path} is not text: byte {content.index(0)} is NUL (UTF-16, or a hole left by a crash?)"
        raise UserError(Problem("data.paths", f"{message}; convert it, or leave it out"))
    yield Document(text, path.stat().st_size)


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    with open_text(path) as (file, raw):
        at = 0
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            text = _text_field(_parse(line, where), field, where)
            # Of a compressed file, what counts is how far into it the reading is.
            last, at = at, at + len(line) if raw is file else raw.tell()
            yield Document(text, at - last)


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    for text, size in read_parquet(path, field):
        yield Document(text, size)


def _parse(line: bytes, where: str) -> Any:
    # json.loads takes bytes too, but guesses their encoding: a NUL makes it speak of UTF-32.
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte {error.start} of the line is {line[error.start]:#04x}"
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON: {error}"
        if b"\0" in line:
            reason = f"not JSON: byte {line.index(0)} of the line is NUL (a hole left by a crash?)"
        elif line.strip() in (b"[", b"{"):
            reason = "not a JSON object: each needs a line of its own (jq -c turns other JSON into that)"
    raise UserError(Problem("data.paths", f"{where}: {reason}"))


def _text_field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(Problem("data.paths", f"{where}: a JSON object is needed, not {type(record).__name__}"))
    if field not in record:
        names = ", ".join(list(record)[:8]) or "none"
        raise UserError(Problem("data.field", f"{where}: no field {field!r}; fields there: {names}"))
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise UserError(Problem("data.field", f"{where}: field {field!r} is {type(text).__name__}, not a string"))
    return text or ""


READERS: dict[str, Reader] = {
    "text": _read_text,
    "source": _read_source,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
"""By the kind of file."""
