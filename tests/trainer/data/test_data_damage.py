"""Damage to tokenized files: flipped bits, cut files, full disks, killed writers. One line each, never a traceback."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from pentad.configs import tokenized
from pentad.configs.errors import UserError
from pentad.configs.schema import BinData
from pentad.configs.tokenized import META_SUFFIX, Coding, read_meta
from pentad.trainer.data import indexed, sources
from pentad.trainer.data.cache import tokenize_cached
from pentad.trainer.data.dataset import open_data
from pentad.trainer.data.indexed import IndexedReader, IndexedWriter
from pentad.trainer.data.tokenize import tokenize, verify_tokens
from pentad.trainer.data.tokenizer import ByteTokenizer

CODING = Coding("byte-1", None, 257, 256)


def write(prefix: Path, coding: Coding | None = CODING) -> Path:
    generator = np.random.default_rng(0)
    with IndexedWriter(str(prefix), np.dtype("u2"), coding=coding) as writer:
        for length in generator.integers(0, 30, 40):
            writer.add(generator.integers(0, 257, length).astype(np.uint16))
    return prefix


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".bin", ".idx", META_SUFFIX])
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "x")
    path = Path(f"{prefix}{suffix}")
    whole, cfg = path.read_bytes(), BinData(paths=(str(prefix),))
    meta = read_meta(str(prefix))
    draw = random.Random(0)
    for bit in draw.sample(range(8 * len(whole)), 150):
        flip(path, bit)
        try:
            open_data(cfg, seq_len=8, vocab=257, seed=0)
        except UserError as error:
            assert len(error.problems) == 1 and path.name in str(error)
        else:
            # White space and the case of an escape's digits mean the same.
            assert suffix == META_SUFFIX and read_meta(str(prefix)) == meta
        path.write_bytes(whole)
    open_data(cfg, seq_len=8, vocab=257, seed=0)


def test_files_without_checksums_are_at_worst_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", coding=None)
    path = Path(f"{prefix}.idx")
    whole, draw = path.read_bytes(), random.Random(1)
    accepted = 0
    for trial in range(400):
        for _ in range(draw.choice((1, 1, 2, 8))):
            # Every other trial only within the header.
            flip(path, draw.randrange(8 * (33 if trial % 2 else len(whole))))
        try:
            data = open_data(BinData(paths=(str(prefix),), document_mask=True), seq_len=8, vocab=1 << 63, seed=0)
            data.train.batch(0, 0, global_batch=8, micro_batch=8)
            data.train.global_counts(0, global_batch=8)
            accepted += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and "x." in str(error)
        path.write_bytes(whole)
    assert accepted < 60


def test_large_files_are_sampled_and_verified_whole_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (tokenized, indexed):
        monkeypatch.setattr(module, "BLOCK_BYTES", 100)
    prefix = write(tmp_path / "x")
    blocks = len(read_meta(str(prefix)).bin_crc32)  # type: ignore[union-attr]
    path = Path(f"{prefix}.bin")
    assert blocks == -(-path.stat().st_size // 100) > 8
    verify_tokens([str(prefix)], print)
    assert f"{prefix}: 40 documents" in capsys.readouterr().out
    for block in range(blocks):
        flip(path, 8 * 100 * block + 3)
        with pytest.raises(UserError, match=rf"x.bin is damaged: bytes {100 * block} to .*copy it again or tokenize"):
            verify_tokens([str(prefix)], print)
        reader = IndexedReader(str(prefix))
        if block % 3:
            reader.verify(1 / 3)
        else:
            with pytest.raises(UserError):
                reader.verify(1 / 3)
        flip(path, 8 * 100 * block + 3)


def test_many_sources_are_looked_at_together_only_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tokenized, indexed):
        monkeypatch.setattr(module, "BLOCK_BYTES", 100)
    paths = tuple(str(write(tmp_path / name)) for name in "xyz")
    size = Path(f"{paths[0]}.bin").stat().st_size
    looked: list[int] = []
    monkeypatch.setattr(indexed.zlib, "crc32", lambda data, start=0: looked.append(len(data)) or crc32(data, start))
    for limit, expected in ((3 * size, 3 * size), (size, size)):
        monkeypatch.setattr(sources, "SCAN_BYTES", limit)
        looked.clear()
        open_data(BinData(paths=paths), seq_len=8, vocab=257, seed=0)
        seen = sum(n for n in looked if n <= 100)
        assert abs(seen - expected) <= 300


def test_checksums_of_other_files_say_what_to_do(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x")
    other = write(tmp_path / "y", coding=None)
    assert not Path(f"{other}{META_SUFFIX}").exists()
    Path(f"{prefix}{META_SUFFIX}").rename(f"{other}{META_SUFFIX}")
    IndexedReader(str(other))
    with IndexedWriter(str(prefix), np.dtype("u2"), coding=CODING) as writer:
        writer.add(np.arange(5, dtype=np.uint16))
    Path(f"{prefix}{META_SUFFIX}").rename(f"{other}{META_SUFFIX}")
    with pytest.raises(UserError, match=r"y.bin is too long: .*delete y.meta.json if it is of other files"):
        IndexedReader(str(other))
    with IndexedWriter(str(other), np.dtype("u2")) as writer:
        writer.add(np.arange(3, dtype=np.uint16))
    assert IndexedReader(str(other)).meta is None


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_file_that_is_cut_while_in_use_is_an_error_that_names_it(
    tmp_path: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(indexed, "_INDEX_IN_MEMORY", 0)
    for suffix in (".bin", ".idx"):
        prefix = write(tmp_path / f"cut_{suffix[1:]}")
        data = open_data(BinData(paths=(str(prefix),), document_mask=True), seq_len=8, vocab=257, seed=0)
        with open(f"{prefix}{suffix}", "r+b") as file:
            file.truncate(16)
        refused = pytest.raises(UserError, match=rf"\{suffix} was cut short while in use: 16 bytes, \d+ when opened")
        with nullcontext() if in_memory and suffix == ".idx" else refused:
            for index in range(8):
                data.train.batch(0, index, global_batch=64, micro_batch=8)


def test_a_cached_pair_with_a_flipped_bit_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text")

    def tokens() -> list[int]:
        files = [tmp_path / "x.txt"]
        return tokenize_cached(tmp_path / "cache", ByteTokenizer(), files, "text", "", progress=False).tokens.tolist()

    whole = [*b"some text", 256]
    assert tokens() == whole
    for suffix in (".bin", ".idx", META_SUFFIX):
        (path,) = (tmp_path / "cache").glob(f"*{suffix}")
        flip(path, 40)
        assert tokens() == whole
    path.unlink()  # the checksums
    assert tokens() == whole
    assert path.exists()


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


FULL_DISK = """
import resource, sys
from pentad.configs.errors import UserError
from pentad.trainer.data.tokenize import tokenize
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    tokenize([sys.argv[1]], "byte", sys.argv[2], progress=False)
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a" * 400_000)
    out = tmp_path / "out"
    (out / "small").parent.mkdir()
    write(out / "x")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said, _ = run(FULL_DISK, str(tmp_path / "x.txt"), str(out / "x")).communicate()
    assert said.startswith("--out: cannot write") and "File too large" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


WRITING = """
import sys, time
import numpy as np
from pentad.trainer.data.indexed import IndexedWriter
with IndexedWriter(sys.argv[1], np.dtype("u2")) as writer:
    writer.add(np.arange(9, dtype=np.uint16))
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_killed_writer_leaves_nothing_under_the_final_names_and_its_rest_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writers = [run(WRITING, str(out / "x")) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert sorted(path.suffix for path in out.iterdir()) == [".bin", ".bin"]
        assert not list(out.glob("x.bin"))
        write(out / "x")
        # The other one is still at work.
        assert len(list(out.glob("x.*.tmp.bin"))) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
    write(out / "x")
    assert sorted(path.name for path in out.iterdir()) == ["x.bin", "x.idx", "x.meta.json"]
    assert tokenize([str(make_text(tmp_path))], "byte", str(out / "x"), progress=False).tokens == 4


def make_text(folder: Path) -> Path:
    (folder / "text.txt").write_text("abc")
    return folder / "text.txt"
