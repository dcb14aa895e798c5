"""A name at top level stands in one file: whoever meets it, or searches for it, finds one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "parallel", "models", "trainer", "launch")

SAME_MEANING = {
    # A collective, and how the memory of one host does it.
    *("all_gather", "all_reduce", "all_to_all", "broadcast", "receive", "reduce_blocks", "reduce_scatter", "send"),
    # Who has which tokens: of one sequence in numpy, and of a microbatch.
    *("by_length", "zigzag"),
    # Where a process begins.
    "main",
    # Adds a row to the registry of its module.
    "register",
    # The index of a folder of files.
    *("read_index", "write_index"),
    # A command is named as it is typed.
    "generate",
}
"""Public functions that mean the same in every file that has one, each only less or more of it."""


def duplicates(kind: type[ast.AST]) -> dict[str, list[str]]:
    """The top-level definitions of a kind that stand in several files, and these."""
    found: dict[str, list[str]] = defaultdict(list)
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, kind) and isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    found[node.name].append(str(path.relative_to(ROOT)))
    return {name: files for name, files in found.items() if len(files) > 1}


def test_no_two_classes_have_one_name() -> None:
    assert duplicates(ast.ClassDef) == {}


def test_public_functions_of_one_name_mean_the_same() -> None:
    found = {name: files for name, files in duplicates(ast.FunctionDef).items() if not name.startswith("_")}
    assert {name: files for name, files in found.items() if name not in SAME_MEANING} == {}
    assert found.keys() == SAME_MEANING, "a name that stands in one file needs no exception"


def test_what_stands_twice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.py").write_text("class Same: ...\n\ndef same(): ...\n")
    monkeypatch.setattr("tests.test_names.ROOT", tmp_path)
    assert duplicates(ast.ClassDef) == {"Same": ["configs/one.py", "configs/two.py"]}
    assert duplicates(ast.FunctionDef) == {"same": ["configs/one.py", "configs/two.py"]}
