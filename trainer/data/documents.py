"""Documents from files: which files a source means, and the text in them, in a fixed order."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError
from ...configs.paths import find_paths

KINDS = ("text", "jsonl", "parquet")
_SUFFIXES = {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet", ".pq")}
# Distributions differ in whether they ship the library's tests, so leaving them out keeps machines alike.
_STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_NO_PYARROW = "reading parquet needs the pyarrow package: pip install pyarrow"


@dataclass(frozen=True)
class Document:
    """One document's text, and how many bytes of input it stands for (for progress only)."""

    text: str
    size: float


def stdlib_files() -> list[Path]:
    """The .py files of the running Python's standard library without its tests, sorted by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIP]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(Problem("data.name", f"no .py files in {root}; use data.name=text with data.paths"))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def find_files(paths: Sequence[str], kind: str | None = None, key: str = "data.paths") -> list[Path]:
    """Files that ``paths`` (files, folders, glob patterns) name, in the order given, each once.

    A folder stands for its files, at any depth and sorted, whose suffix fits ``kind`` (every file for text and
    None), hidden ones left out. Raises UserError naming every path that matches nothing.
    """
    problems: list[Problem] = []
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = list(_walk(path, kind))
            if not matches:
                problems.append(Problem(key, f"no {kind or 'visible'} files in folder {given}"))
        elif glob.has_magic(given):
            matches = [Path(m) for m in find_paths(str(path)) if os.path.isfile(m)]
            if not matches:
                problems.append(Problem(key, f"no file matches {given}"))
        else:
            matches = []
            problems.append(Problem(key, f"no such file or folder: {given}"))
        found.update(dict.fromkeys(matches))
    if not paths:
        problems.append(Problem(key, "no paths; give files, folders or glob patterns"))
    if problems:
        raise UserError(*problems)
    return list(found)


def _walk(root: Path, kind: str | None) -> Iterator[Path]:
    suffixes = _SUFFIXES.get(kind or "")
    for path in sorted(root.rglob("*")):
        visible = not any(part.startswith(".") for part in path.relative_to(root).parts)
        if visible and path.is_file() and (suffixes is None or path.suffix.lower() in suffixes):
            yield path


def kind_of(path: Path) -> str:
    """text, jsonl or parquet, by suffix."""
    return next((kind for kind, suffixes in _SUFFIXES.items() if path.suffix.lower() in suffixes), "text")


def read_documents(files: Iterable[Path], kind: str | None = None, field: str = "text") -> Iterator[Document]:
    """Every non-empty document of ``files``, in order; ``kind`` None goes by each file's suffix.

    Raises UserError naming the file and the line, row or byte that cannot be read.
    """
    readers: dict[str, Callable[[Path], Iterator[Document]]] = {
        "text": _read_text,
        "source": lambda path: _read_text(path, errors="replace"),
        "jsonl": lambda path: _read_jsonl(path, field),
        "parquet": lambda path: _read_parquet(path, field),
    }
    for path in files:
        try:
            yield from (d for d in readers[kind or kind_of(path)](path) if d.text)
        except OSError as error:
            raise UserError(Problem("data.paths", f"cannot read {path}: {error.strerror or error}")) from None


def _read_text(path: Path, errors: str = "strict") -> Iterator[Document]:
    content = path.read_bytes()
    try:
        yield Document(content.decode("utf-8", errors=errors), len(content))
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}"
        raise UserError(Problem("data.paths", message)) from None


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(Problem("data.paths", f"{path}:{number}: not valid JSON: {error}")) from None
            yield Document(_text_field(record, field, f"{path}:{number}"), len(line))


def _text_field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(Problem("data.paths", f"{where}: a JSON object is needed, not {type(record).__name__}"))
    if field not in record:
        keys = ", ".join(list(record)[:8]) or "none"
        raise UserError(Problem("data.field", f"{where}: no field {field!r}; fields there: {keys}"))
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise UserError(Problem("data.field", f"{where}: field {field!r} is {kind}, not a string"))
    return record[field]


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(Problem("data.name", _NO_PYARROW)) from None
    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            if field not in schema.names:
                columns = ", ".join(schema.names[:8])
                raise UserError(Problem("data.field", f"{path}: no column {field!r}; columns there: {columns}"))
            kind = schema.field(field).type
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise UserError(Problem("data.field", f"{path}: column {field!r} is {kind}, not a string"))
            size, row = path.stat().st_size / max(rows, 1), 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise UserError(Problem("data.field", f"{path}: row {row}: column {field!r} is null"))
                    yield Document(text, size)
    except arrow.ArrowException as error:
        message = f"{path} is not a readable parquet file: {' '.join(str(error).split())[:200]}"
        raise UserError(Problem("data.paths", message)) from None
