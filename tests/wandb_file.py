"""What an offline W&B run has written, read from its file as the server would."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FILE_HEADER = 32768, 7, 7
_WRITTEN_S = 30.0
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _bodies(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: pieces (crc, u16 length, u8 type) in blocks of 32 KiB."""
    at, begun = _FILE_HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < _HEADER or kind == 0:
            at += left
            continue
        piece, at = data[at + _HEADER : at + _HEADER + length], at + _HEADER + length
        begun = piece if kind in (_WHOLE, _FIRST) else begun + piece
        if kind in (_WHOLE, _LAST):
            yield begun


def _records(file: Path) -> list[Any]:
    """All records of a run that has ended: the process that writes them does so after the run's last call returned."""
    from wandb.proto import wandb_internal_pb2

    until = time.monotonic() + _WRITTEN_S
    while True:
        records = []
        for body in _bodies(file.read_bytes()):
            records.append(wandb_internal_pb2.Record())  # type: ignore[attr-defined]
            records[-1].ParseFromString(body)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < until, f"{file} does not end"
        time.sleep(0.05)


def _began(file: Path) -> float:
    """When the folder's first file was made; the log itself is written to until the end."""
    return min(path.stat().st_mtime for path in file.parent.rglob("*") if path.is_file())


def read_offline(run_dir: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Of the newest run in a folder: the rows of the history, keys with slashes, and (title, text) of the alerts."""
    (*_, file) = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=_began)
    rows, alerts = [], []
    for record in _records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif record.WhichOneof("record_type") == "alert":
            alerts.append((record.alert.title, record.alert.text))
    return rows, alerts
