"""`metrics.jsonl`."""

from __future__ import annotations

import os
from pathlib import Path

from ....configs.strict_json import JsonError, expect_int, expect_object, parse_json
from ..line_file import LineFile
from ..report import Report


class JsonlSink:
    """`metrics.jsonl`: one object a step, in the file at once, each step there once however often the run resumes."""

    def __init__(self, path: Path, resume_step: int = 0, *, again: bool = False) -> None:
        """resume_step: newest step already trained; later lines are dropped. 0 moves an old file aside, unless the same
        run goes on `again`."""
        if resume_step or again:
            _keep_until(path, resume_step)
        elif path.exists():
            os.replace(path, path.with_suffix(".previous.jsonl"))
        self._file = LineFile(path)

    def log(self, report: Report) -> None:
        self._file.write(report.row)

    def add(self, report: Report) -> None:
        """Nothing: evaluations are in `events.jsonl`."""

    def close(self) -> None:
        self._file.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, a half-written one, and repetitions, by atomic replacement."""
    if not path.exists():
        return
    kept: dict[int, bytes] = {}
    for line in path.read_bytes().splitlines():
        try:
            at = expect_int(expect_object(parse_json(line), "a line", ("step",))["step"], "step")
        except JsonError:
            continue
        if at <= step:
            kept[at] = line
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.writelines(kept[at] + b"\n" for at in sorted(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
