"""What is installed is what there is."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "parallel", "models", "trainer", "launch")


def test_every_folder_of_code_is_a_package_of_the_project() -> None:
    """A folder that is not listed would be missing from a wheel, and from nothing else."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {file.parent for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert sorted(listed) == sorted("pentad." + ".".join(folder.relative_to(ROOT).parts) for folder in found)


def test_rooms_are_small() -> None:
    """Someone new sees at a glance what a folder holds."""
    for room in ROOMS:
        for folder in [ROOT / room, *(f for f in (ROOT / room).rglob("*") if f.is_dir())]:
            entries = [each for each in folder.iterdir() if each.name != "__pycache__"]
            is_data = folder.is_relative_to(ROOT / "configs" / "presets")
            assert len(entries) <= 24 or is_data, folder
