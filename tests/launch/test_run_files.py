"""Files of a run's folder that are damaged or come from elsewhere: refused in one line, or passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pentad.configs import UserError
from pentad.launch.cli import main
from pentad.trainer.metrics.sinks.jsonl import JsonlSink
from pentad.trainer.metrics.summary import lines_of, summarize

_PROGRAM: dict[str, Any] = {"microbatches": 1, "placement": [0], "vocab_barriers": 0, "ranks": [["F0@0", "BW0@0"]]}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"ranks": []}',
        json.dumps({**_PROGRAM, "placement": [3]}),
        json.dumps({**_PROGRAM, "placement": []}),
        json.dumps({**_PROGRAM, "microbatches": "1"}),
        json.dumps({**_PROGRAM, "microbatches": -1}),
        json.dumps({**_PROGRAM, "vocab_barriers": 7}),
        json.dumps({**_PROGRAM, "ranks": [["F0@5"]]}),
        json.dumps({**_PROGRAM, "ranks": [["rm -rf"]]}),
        json.dumps({**_PROGRAM, "ranks": [[3]]}),
        json.dumps({**_PROGRAM, "ranks": [["BW0@0", "F0@0"]]}),
    ],
)
def test_a_program_that_none_has_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "program.json").write_text(text)
    assert main(["schedule", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/program.json: is not the program of a run: ")


def test_a_summary_of_foreign_metrics_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "high"}\n')
    with pytest.raises(UserError, match="is not what a run writes"):
        summarize(tmp_path)


@pytest.mark.parametrize("line", ['{"step": 1e999}', "[" * 100_000, '{"step": "2"}', '{"step": 2, "step": 1}', "half"])
def test_lines_that_no_run_has_written_are_passed_over(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + line + "\n")
    assert {"step": 1} in lines_of(file)
    JsonlSink(file, resume_step=5).close()
    assert file.read_text() == '{"step": 1}\n'


def test_a_link_in_place_of_metrics_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="cannot be read"):
        lines_of(tmp_path / "metrics.jsonl")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("pentad ")
