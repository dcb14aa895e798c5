"""What an offline W&B run has written, read from its file as the server would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FILE_HEADER = 32768, 7, 7
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


def read_offline(run_dir: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Of the newest run in a folder: the rows of the history, keys with slashes, and (title, text) of the alerts."""
    from wandb.proto import wandb_internal_pb2

    (*_, file) = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    rows, alerts = [], []
    for body in _bodies(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(body)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif record.WhichOneof("record_type") == "alert":
            alerts.append((record.alert.title, record.alert.text))
    return rows, alerts
