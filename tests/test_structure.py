"""The code stays a house that someone new can read: small files and functions, and imports that point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "parallel", "models", "trainer", "launch")
"""Each may import those before it."""
FILES = {
    "pentad." + ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for room in ROOMS
    for file in sorted((ROOT / room).rglob("*.py"))
}
"""Every module of the product, by its name."""


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(module: str, file: Path) -> Iterator[str]:
    """The modules of the product that a file imports anywhere, for types alone too."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(_tree(file)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{a.name}" if f"{origin}.{a.name}" in FILES else origin for a in node.names]
        yield from (name for name in names if name in FILES)


@cache
def _all_imports() -> dict[str, set[str]]:
    return {module: set(_imports(module, file)) for module, file in FILES.items()}


def test_rooms_import_only_the_rooms_below_them() -> None:
    floor = {f"pentad.{room}": number for number, room in enumerate(ROOMS)}
    upward = [
        (module, other)
        for module, others in _all_imports().items()
        for other in others
        if floor[".".join(module.split(".")[:2])] < floor[".".join(other.split(".")[:2])]
    ]
    assert upward == []


def test_no_imports_go_round_in_a_circle() -> None:
    try:
        TopologicalSorter(_all_imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_are_read_in_one_sitting() -> None:
    long = {module: count for module, file in FILES.items() if (count := len(file.read_text().splitlines())) > 400}
    assert long == {}


def test_functions_have_one_job() -> None:
    long = {
        f"{module}.{node.name}": lines
        for module, file in FILES.items()
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 60
    }
    assert long == {}
