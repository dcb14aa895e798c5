"""The list of families, and that a family's facts stand in its own file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pentad.configs.errors import UserError
from pentad.configs.tables.families import BUILT_IN
from pentad.models.hf.families import Family, all_families, find_family, register

ROOT = Path(__file__).parents[3]


def test_every_family_has_a_file_and_a_preset() -> None:
    files = {file.stem for file in (ROOT / "models" / "hf" / "families").glob("*.py")} - {"__init__", "family"}
    presets = {file.stem for file in (ROOT / "configs" / "presets" / "families").glob("*.yaml")}
    assert files == presets == set(BUILT_IN)
    assert [find_family(name).name for name in BUILT_IN] == list(BUILT_IN)
    assert len({family.architecture for family in all_families()}) == len(all_families())


def test_nobody_else_asks_for_a_family_by_its_name() -> None:
    names = "|".join(BUILT_IN)
    asks = re.compile(rf"family\b[^\n]*(==|!=|\bin\b)[^\n]*|case \"({names})\"")
    for room in ("configs", "parallel", "models", "trainer", "launch"):
        for file in (ROOT / room).rglob("*.py"):
            if file.is_relative_to(ROOT / "models" / "hf" / "families"):
                continue
            found = [line for line in file.read_text().splitlines() if asks.search(line) and re.search(names, line)]
            assert found == [], file


def test_a_family_cannot_take_anothers_place() -> None:
    llama = find_family("llama")
    with pytest.raises(UserError, match="family llama: there is one of this name already"):
        register(Family(name="llama", architecture="OtherForCausalLM", read=llama.read, write=llama.write))
    with pytest.raises(UserError, match="family other: LlamaForCausalLM is the architecture of llama already"):
        register(Family(name="other", architecture="LlamaForCausalLM", read=llama.read, write=llama.write))
    with pytest.raises(UserError, match="a name has small letters"):
        register(Family(name="Other One", architecture="OtherForCausalLM", read=llama.read, write=llama.write))
