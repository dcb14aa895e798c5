"""The page: one file with its style, its script and its numbers, which asks nobody for anything."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...run_folder import RunFile
from ..waterfall_picture import PART_COLOURS
from .run_data import run_data
from .timeline import step_drawing

_MOST_RUNS = 8
_HERE = Path(__file__).parent
_DIFFERING = 200
"""Keys of configurations in which runs differ, that are shown."""


def write_page(runs: Sequence[Path], out: Path | None = None, *, step: int | None = None) -> Path:
    """Writes the page of one or more runs, whole or not at all.

    Args:
        runs: their folders; of several, each chart has all of them.
        out: the file; none: report.html in the folder of the first run.
        step: which of the first run's steps is drawn; None: the last one that its record has.

    Returns:
        The file.

    Raises:
        UserError: a folder is no run's, or its record does not hold the step.
        OSError: the file cannot be written.
    """
    target = runs[0] / RunFile.REPORT if out is None else out
    text = page(runs, step=step)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def page(runs: Sequence[Path], *, step: int | None = None) -> str:
    """The text of the page; arguments and errors as of `write_page`."""
    found = [run_data(run) for run in runs]
    drawings = [step_drawing(run, step if number == 0 else None) for number, run in enumerate(runs)]
    for data, drawing in zip(found, drawings, strict=True):
        data["drawn_step"] = drawing.get("step")
        data["no_drawing"] = drawing.get("why")
    differing = _differing([data.pop("config") for data in found]) if len(found) > 1 else []
    content = {"runs": found, "colours": PART_COLOURS, "differing": differing}
    title = ", ".join(data["name"] for data in found)
    parts = {
        "TITLE": escape(title if len(title) <= 120 else title[:119] + "…"),
        "STYLE": (_HERE / "page.css").read_text(encoding="utf-8"),
        "DATA": _in_script(content),
        "DRAWINGS": "".join(
            f'<template data-run="{number}">{drawing["svg"]}</template>\n'
            for number, drawing in enumerate(drawings)
            if "svg" in drawing
        ),
        "SCRIPT": "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js")),
    }
    pieces = (_HERE / "page.html").read_text(encoding="utf-8").split("%%")  # text, name, text, name … text
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def _in_script(value: Any) -> str:
    """JSON that no parser of HTML takes for markup, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _differing(configs: Sequence[dict[str, str]]) -> list[list[str]]:
    """Rows of key and values of the keys in which the runs differ."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [[key, *(config.get(key, "–") for config in configs)] for key in keys if key not in ("name", "runs_dir")]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] != "checkpoint.dir"][:_DIFFERING]
