"""Damage by chance: each is found and named, and the checkpoint before is used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.trainer.checkpoint.checkpointer import Checkpointer, read_full, verify
from tests.trainer.checkpoint.layouts import checkpointer, global_values, pieces, same

OLDER, NEWER = "step-00000010", "step-00000020"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one run, with a file beside the tensors, and one of another run with the same steps."""
    folder = tmp_path_factory.mktemp("kept")
    for run, seed in (("mine", 0), ("other", 5)):
        saver = checkpointer(folder / run)
        saver.beside = {"tokenizer.json": b'{"kind": "bytes"}' * (1 + seed)}
        for step in (10, 20):
            saver.save(step, pieces("ddp", 1, 0, 1, global_values(seed + step)), {"tokens": step, "seed": seed})
    return folder


class _Bench:
    """A copy that is damaged and mended again and again."""

    def __init__(self, kept: Path, folder: Path) -> None:
        self.kept, self.folder = kept, folder / "checkpoints"
        shutil.copytree(kept / "mine", self.folder)
        self.newer = self.folder / NEWER
        self.loader: Checkpointer = checkpointer(self.folder)

    def files(self) -> list[Path]:
        """Of the newer checkpoint, each byte of which can be damaged."""
        return sorted(self.newer.iterdir())

    def expect(self, *names: str) -> None:
        """Every reader names the damaged files; `latest` takes the one before, whose values are as they were."""
        problems = verify(self.newer)
        assert problems and all(any(name in problem for problem in problems) for name in names), (names, problems)
        assert all("\n" not in problem for problem in problems)
        assert self.loader.find_resume("latest") == self.folder / OLDER
        with pytest.raises(UserError, match="is damaged"):
            self.loader.find_resume(self.newer)

    def mend(self) -> None:
        """Everything as it was."""
        shutil.rmtree(self.newer)
        shutil.copytree(self.kept / "mine" / NEWER, self.newer)


def _flip(bench: _Bench, draws: random.Random) -> str:
    """A bit of a file, every file alike often: the small ones say what the large ones are."""
    file = draws.choice(bench.files())
    data = bytearray(file.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    file.write_bytes(data)
    return file.name


def _truncate(bench: _Bench, draws: random.Random) -> str:
    file = draws.choice(bench.files())
    os.truncate(file, draws.randrange(file.stat().st_size))
    return file.name


def _by_chance(bench: _Bench, damage: Callable[[_Bench, random.Random], str], seeds: range) -> None:
    for seed in seeds:
        name = damage(bench, random.Random(seed))
        # A flipped bit of the manifest may be one of its layout (a blank for a tab): then nothing is damaged.
        if not (name == "manifest.json" and _same_manifest(bench)):
            bench.expect(name)
        shutil.copy(bench.kept / "mine" / NEWER / name, bench.newer / name)


def _same_manifest(bench: _Bench) -> bool:
    before = bench.kept / "mine" / NEWER
    try:
        mine, theirs = (json.loads((path / "manifest.json").read_bytes()) for path in (bench.newer, before))
    except ValueError:
        return False
    return mine == theirs


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_flipped_bits(kept: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    _by_chance(_Bench(kept, tmp_path), _flip, range(count))


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_cut_files(kept: Path, tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    _by_chance(_Bench(kept, tmp_path), _truncate, range(10_000, 10_000 + count))


def test_missing_swapped_and_foreign_files(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = _Bench(kept, tmp_path)
    names = [file.name for file in bench.files()]
    assert len(names) == 5
    for name in names:
        (bench.newer / name).unlink()
        bench.expect(name)
        bench.mend()
        for source in (kept / "mine" / OLDER, kept / "other" / NEWER):  # of the step before, of another run
            if (source / name).read_bytes() != (bench.newer / name).read_bytes():
                shutil.copy(source / name, bench.newer / name)
                bench.expect(*([] if name == "manifest.json" else [name]))
                bench.mend()
    for one in names:
        for other in names:
            if one < other and (bench.newer / one).read_bytes() != (bench.newer / other).read_bytes():
                spare = bench.newer / "spare"
                os.rename(bench.newer / one, spare)
                os.rename(bench.newer / other, bench.newer / one)
                os.rename(spare, bench.newer / other)
                bench.expect(*([one, other] if "manifest.json" not in (one, other) else []))
                bench.mend()
    assert verify(bench.newer) == [] and bench.loader.find_resume("latest") == bench.newer


def test_a_folder_under_anothers_name_is_damaged(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = _Bench(kept, tmp_path)
    shutil.rmtree(bench.newer)
    shutil.copytree(kept / "mine" / OLDER, bench.newer)
    bench.expect("was saved as step 10")


def test_what_was_used_instead_has_the_values_of_its_step(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = _Bench(kept, tmp_path)
    _flip(bench, random.Random(3))
    found = bench.loader.find_resume("latest")
    assert found is not None
    mine = pieces("ddp", 1, 0, 1, None)
    assert bench.loader.load(found, mine)["tokens"] == 10
    assert same(mine, pieces("ddp", 1, 0, 1, global_values(10)))
    assert all(torch.equal(value, global_values(10)[name]) for name, value in read_full(found)[0].items())
