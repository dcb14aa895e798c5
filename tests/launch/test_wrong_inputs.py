"""Wrong inputs of every kind: one clear line each with the way out, exit code 2, no rank, and no torch without need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.wrong_inputs import CASES, filled, prepare

Results = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("wrong")
    prepare(folder)
    done = subprocess.run([sys.executable, "-m", "tests.launch.wrong_inputs", str(folder)], check=False)
    assert done.returncode == 0
    return folder, json.loads((folder / "results.json").read_text())


def test_there_are_enough_of_them_and_none_twice() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 100


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_one_line_with_the_way_out(number: int, results: Results) -> None:
    folder, found = results
    case, result = CASES[number], found[number]
    assert result["code"] == 2, result
    lines = [line for line in result["err"].strip().splitlines() if not line.startswith("pentad: ")]  # notices
    assert len(lines) == case.lines, lines
    assert all(line.startswith("error: ") and len(line) < 600 for line in lines), lines
    assert result["out"] == "" or case.argv[0] == "check"
    for part in filled(case, folder)[1]:
        assert any(part in line for line in lines), (part, lines)
    assert case.torch or not result["torch"], "torch was imported to say so"


def test_nothing_was_written(results: Results) -> None:
    folder, _ = results
    assert sorted(p.name for p in (folder / "runs").iterdir()) == ["old", "used"]
    assert not list(folder.glob("x*"))
