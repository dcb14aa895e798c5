"""The documentation names everything that there is to name; what is installed is what is used."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from pentad.configs import preset_names
from pentad.launch.cli import _parser

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "parallel", "models", "trainer", "launch")


def _docs(name: str = "*") -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob(f"{name}.md")))


@pytest.mark.parametrize("kind", ["models", "hardware", "jobs"])
def test_every_preset_is_in_the_page_about_configuration(kind: str) -> None:
    page = _docs("config")
    assert [name for name in preset_names(kind) if f"`{name}`" not in page] == []


def test_every_command_and_every_option_is_documented() -> None:
    parser, verbs = _parser()
    page, everything = _docs("launch"), _docs()
    assert [verb for verb in verbs if f"`pentad {verb}" not in page] == []
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    options = {o for p in commands.choices.values() for a in p._actions for o in a.option_strings if o.startswith("--")}
    assert [option for option in sorted(options - {"--help"}) if option not in everything] == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([\w.-]+\.md)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[><=\[ ]", d)[0] for d in project["dependencies"]}
    extras = {
        re.split(r"[><=\[ ]", d)[0]
        for name, ds in project["optional-dependencies"].items()
        for d in ds
        if name != "dev"
    }
    names = {"pyyaml": "yaml", "prometheus-client": "prometheus_client"}
    imported: set[str] = set()
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    imported.add(node.module.split(".")[0])
    # Triton comes with torch, tensorboard is imported by torch's writer; the others are used where somebody put them.
    mentioned = {names.get(d, d) for d in declared | extras}
    others = imported - set(sys.stdlib_module_names) - mentioned
    assert others <= {"triton", "apex", "amp_C", "fused_layer_norm_cuda", "deep_ep", "__future__"}, others
    assert {names.get(d, d) for d in declared} - imported == set()
    assert {names.get(d, d) for d in extras} - imported <= {"tensorboard"}
