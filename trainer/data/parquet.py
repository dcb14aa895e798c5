"""The text column of parquet files, whatever way it is stored, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError

_NO_PYARROW = "reading parquet needs the pyarrow package: pip install pyarrow"
_ROWS = 1024


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, float]]:
    """Text and bytes of input (for progress) of each row; "" where it is null.

    The column may hold strings or UTF-8 bytes, in any of Arrow's layouts, dictionaries included. Raises UserError.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(Problem("data.paths", f"{path}: {_NO_PYARROW}")) from None
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if field not in names:
                raise UserError(
                    Problem("data.field", f"{path}: no column {field!r}; columns there: {', '.join(names[:8])}")
                )
            index = names.index(field)
            kind = file.schema_arrow.field(index).type
            if not is_textual(kind):
                raise UserError(Problem("data.field", f"{path}: column {field!r} is {kind}, not a string"))
            size, row = path.stat().st_size / max(rows, 1), 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                for value in batch.column(batch.schema.names.index(field)).to_pylist():
                    row += 1
                    yield _text(value, f"{path}: row {row}: column {field!r}"), size
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = f"{path} is not a readable parquet file: {' '.join(str(error).split())[:200]}"
        raise UserError(Problem("data.paths", message)) from None


def is_textual(kind: Any) -> bool:
    """Whether an Arrow type holds text: strings or bytes, or a dictionary of them, or nothing but nulls."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_textual(kind.value_type)
    views = [getattr(types, name, None) for name in ("is_string_view", "is_binary_view")]  # from pyarrow 16 on
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
    return any(test is not None and test(kind) for test in (*tests, *views))


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            Problem("data.field", f"{where} is not UTF-8: byte {error.start} is {value[error.start]:#04x}")
        ) from None
