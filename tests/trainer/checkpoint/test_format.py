"""What a checkpoint's files may say: nothing of them runs, nothing is believed, older ones load."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer.checkpoint import tensors as checkpoint_tensors
from pentad.trainer.checkpoint.checkpointer import CheckpointError, read_full, verify, write_full
from pentad.trainer.checkpoint.index import read_contents
from pentad.trainer.checkpoint.manifest import Damaged, read_manifest
from pentad.trainer.checkpoint.slices import CheckpointSlices
from tests.trainer.checkpoint.layouts import checkpointer

OLD = Path(__file__).parent / "format1" / "step-00000010"
OLD_VALUES = {
    "model/a": (torch.arange(12.0) / 7).view(3, 4),
    "optim/exp_avg/a": (torch.arange(12.0) - 5).view(3, 4),
    "model/half": (torch.arange(5.0) / 3).to(torch.bfloat16),
    "model/count": torch.tensor(7),
}
"""What two ranks saved, each a part of `a`, when the index was a pickle of torch's distributed checkpoint."""


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


# Older checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_format_1_loads_equal_in_every_way() -> None:
    assert verify(OLD) == []
    found, state = read_full(OLD)
    assert found.keys() == OLD_VALUES.keys() and all(_equal(found[n], OLD_VALUES[n]) for n in found)
    assert state == {"step": 10, "tokens": 123, "nested": {"a": [1, 2.5, None]}}
    loader = checkpointer(OLD.parent)
    assert loader.find_resume("latest") == OLD
    place = Placement.shard((3, 4), 1, 1, 2)  # a slice that both ranks' boxes touch, and a run of it
    data = torch.zeros(4)
    pieces = {
        "model/a": GlobalTensor(place, 1, 5, data),
        "model/half": GlobalTensor.of(torch.zeros(5)),
        "model/count": GlobalTensor.of(torch.tensor(0)),
    }
    loader.load(OLD, pieces, prefix="model/", cast=True)
    assert torch.equal(data, place.of(OLD_VALUES["model/a"]).reshape(-1)[1:5])
    assert torch.equal(pieces["model/half"].local, OLD_VALUES["model/half"].float())
    assert int(pieces["model/count"].local) == 7
    slices = CheckpointSlices(OLD, {"a": (3, 4)})
    assert torch.equal(slices.read("a", place), place.of(OLD_VALUES["model/a"]))


class _Touch:
    """Runs a command where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def _old_with(folder: Path, name: str, data: bytes) -> Path:
    """A copy of the old checkpoint with another file, for which its manifest vouches."""
    path = folder / OLD.name
    shutil.copytree(OLD, path)
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(data), "crc32": zlib.crc32(data)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def _refused_everywhere(path: Path, reason: str) -> torch.Tensor:
    """Also returns what a job would have loaded."""
    loader = checkpointer(path.parent)
    a = {"model/a": GlobalTensor.of(torch.zeros(3, 4))}
    readers: list[Callable[[], object]] = [
        lambda: read_full(path),
        lambda: read_full(path, ["model/a"]),
        lambda: loader.load(path, a, prefix="model/", left=""),
        lambda: CheckpointSlices(path, {"a": (3, 4)}).read("a", Placement.whole((3, 4))),
    ]
    for read in readers:
        with pytest.raises(UserError) as error:
            read()
        assert len(error.value.problems) == 1 and "\n" not in str(error.value)
        assert reason in str(error.value) and str(path) in str(error.value)
    return a["model/a"].local


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_an_old_index_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    path = _old_with(tmp_path, ".metadata", pickle.dumps(_Touch(marker), protocol))
    assert [problem.startswith(".metadata is refused") for problem in verify(path)] == [True]
    assert not _refused_everywhere(path, ".metadata is refused").any()
    assert not marker.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert marker.exists(), "it would have run"


def test_code_in_an_old_tensor_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    hostile = tmp_path / "hostile.pt"
    torch.save(_Touch(marker), hostile)
    data = (OLD / "__0_0.distcp").read_bytes()
    start = read_contents(OLD).tensors["model/a"].boxes[0].start
    path = _old_with(tmp_path, "__0_0.distcp", data[:start] + hostile.read_bytes().ljust(len(data) - start, b"\0"))
    _refused_everywhere(path, "holds no tensor")
    assert not marker.exists()


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, 4)


NONSENSE = {
    "empty": b"",
    "a number": _pickled(7),
    "a dictionary": _pickled({"state_dict_metadata": {}}),
    "cut short": (OLD / ".metadata").read_bytes()[:-300],
    "a huge memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a persistent id": b"Pevil\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "deep": b"\x80\x02" + b"(" * 100_000 + b".",
    "torch.load": b"\x80\x02ctorch\nload\n.",
    "a class of pathlib": b"\x80\x02cpathlib\nPath\n.",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_an_old_index_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    _refused_everywhere(_old_with(tmp_path, ".metadata", NONSENSE[kind]), ".metadata is refused")


def test_an_old_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    data = (OLD / ".metadata").read_bytes()
    assert data.count(b"__0_0.distcp") == 1
    _refused_everywhere(
        _old_with(tmp_path, ".metadata", data.replace(b"__0_0.distcp", b"/etc/.passwd")), "/etc/.passwd"
    )


# The manifest ---------------------------------------------------------------------------------------------------


def _saved(folder: Path) -> Path:
    saver = checkpointer(folder)
    for step in (5, 10):
        saver.save(step, {"model/a": GlobalTensor.of(torch.arange(12.0).view(3, 4))}, {"tokens": step})
    return folder / "step-00000010"


def _damaged(path: Path, reason: str) -> None:
    """Named by every reader, in one line, and the checkpoint before is used."""
    problems = verify(path)
    assert len(problems) == 1 and reason in problems[0] and "\n" not in problems[0], problems
    loader = checkpointer(path.parent)
    assert loader.find_resume("latest") == path.parent / "step-00000005"
    with pytest.raises(UserError, match="is damaged"):
        loader.find_resume(path)


def test_every_single_bit_of_a_manifest_counts_or_changes_nothing(tmp_path: Path) -> None:
    """A flip is found, or what the manifest says is as it was (another kind of space, another spelling of a letter)."""
    path = _saved(tmp_path)
    data, whole, unnoticed = (path / "manifest.json").read_bytes(), read_manifest(path), 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "manifest.json").write_bytes(flipped)
        with contextlib.suppress(Damaged):
            assert read_manifest(path) == whole
            unnoticed += 1
    assert unnoticed < 2 * data.count(b"\n") + 2


MANIFESTS: dict[str, tuple[Callable[[str], str], str]] = {
    "a file twice": (
        lambda text: text.replace('"state.json"', '"tensors.json"'),
        "'tensors.json' is there twice",
    ),
    "beyond a float": (lambda text: text.replace('"step": 10', '"step": 1e999'), "'1e999' is too large"),
    "NaN": (lambda text: text.replace('"step": 10', '"step": NaN'), "NaN is no number"),
    "deep": (lambda text: "[" * 100_000, "nested deeper"),
    "another checksum": (lambda text: text.replace('"step": 10', '"step": 11'), "its own checksum is"),
    "a list": (lambda text: "[]", "not an object"),
    "no files": (lambda text: '{"format": 2}', "lacks files"),
    "no checksum": (lambda text: '"crc"'.join(text.rsplit('"crc32"', 1)), "lacks crc32"),
    "a float for a format": (
        lambda text: text.replace('"format": 2', '"format": 2.0'),
        "format is 2.0, not an integer",
    ),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_is_not_as_written_is_refused(tmp_path: Path, kind: str) -> None:
    change, reason = MANIFESTS[kind]
    path = _saved(tmp_path)
    text = (path / "manifest.json").read_text()
    changed = change(text)
    assert changed != text
    (path / "manifest.json").write_text(changed)
    _damaged(path, reason)


def _signed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest as somebody would who knows the format."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    manifest["crc32"] = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "", "new\nline"])
def test_a_manifest_names_only_files_of_its_folder(tmp_path: Path, name: str) -> None:
    path = _saved(tmp_path)
    _signed(path, lambda m: m["files"].__setitem__(name, {"size": 1, "crc32": 0}))
    _damaged(path, "not the name of a file")


@pytest.mark.parametrize(("size", "crc"), [(-1, 0), (1.5, 0), (True, 0), (1, 2**32), (1, "0"), (2**70, 0), (None, 0)])
def test_a_manifest_has_numbers_that_can_be(tmp_path: Path, size: Any, crc: Any) -> None:
    path = _saved(tmp_path)
    _signed(path, lambda m: m["files"].__setitem__("x", {"size": size, "crc32": crc}))
    _damaged(path, "manifest.json is not readable")


def test_a_link_or_a_pipe_in_the_place_of_a_file_is_damage(tmp_path: Path) -> None:
    for i, place in enumerate((lambda file, moved: file.symlink_to(moved), lambda file, _: os.mkfifo(file))):
        for name in ("manifest.json", "state.json", "tensors.json", "rank-00000-0.safetensors"):
            path = _saved(tmp_path / str(i) / name)
            moved = tmp_path / str(i) / f"moved {name}"
            (path / name).rename(moved)
            place(path / name, moved)
            _damaged(path, ("symbolic link", "not a regular file")[i])


def test_a_checkpoint_renamed_to_another_step_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path).rename(tmp_path / "step-00000020")
    _damaged(path, "saved as step 10 and its folder was renamed to step-00000020")
    old = tmp_path / "old" / "step-00000030"
    shutil.copytree(OLD, old)
    shutil.copytree(path, tmp_path / "old" / "step-00000010")
    assert "saved as step 10" in verify(old)[0]
    assert checkpointer(tmp_path / "old").find_resume("latest") == tmp_path / "old" / "step-00000010"
    kept = path.rename(tmp_path / "the best one")
    assert verify(kept) == [] and checkpointer(tmp_path).find_resume(kept) == kept
    with pytest.raises(UserError, match="the name of another step's checkpoint than 0"):
        write_full(tmp_path / "step-00000007", {"model/a": torch.zeros(1)}, {"step": 0})


def test_what_cannot_be_used_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, keep=2)
    tensors = {"model/a": GlobalTensor.of(torch.zeros(3))}
    for step in (1, 2):
        saver.save(step, tensors, {})
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000003")
    saver.save(4, tensors, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003", "step-00000004"]
    saver.save(5, tensors, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004", "step-00000005"]


# The index ------------------------------------------------------------------------------------------------------


def _with_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes an index as somebody would who knows the format."""
    index = json.loads((path / "tensors.json").read_text())
    change(index)
    data = json.dumps(index).encode()
    (path / "tensors.json").write_bytes(data)
    _signed(path, lambda m: m["files"]["tensors.json"].update(size=len(data), crc32=zlib.crc32(data)))


def _tensor(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["tensors"]["model/a"].__setitem__(key, value)


INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a file that is not listed": (lambda i: i["files"].__setitem__(0, "other"), "the manifest does not list"),
    "a file elsewhere": (lambda i: i["files"].__setitem__(0, "../state.json"), "not the name of a file"),
    "a file's number": (_tensor("boxes", [[1, 0, [0, 0], [3, 4]]]), "not between 0 and 0"),
    "beyond the file": (_tensor("boxes", [[0, 10_000, [0, 0], [3, 4]]]), "ends at byte 10048"),
    "before the file": (_tensor("boxes", [[0, -8, [0, 0], [3, 4]]]), "first byte of model/a is -8"),
    "outside the shape": (_tensor("boxes", [[0, 0, [0, 1], [3, 4]]]), "not inside its shape"),
    "another rank": (_tensor("boxes", [[0, 0, [0], [3]]]), "not inside its shape"),
    "a hole": (_tensor("boxes", [[0, 0, [0, 0], [3, 3]]]), "does not hold each once"),
    "an overlap and a hole": (
        _tensor("boxes", [[0, 0, [0, 0], [2, 4]], [0, 0, [1, 0], [1, 4]]]),
        "does not hold each once",
    ),
    "a huge shape": (_tensor("shape", [2**40, 2**20]), "does not hold each once"),
    "a dtype": (_tensor("dtype", "F4"), "unknown dtype"),
    "a dtype of another type": (_tensor("dtype", ["F32"]), "not a text"),
    "a name that is no line": (lambda i: i["tensors"].__setitem__("a\nb", {}), "not the name of a tensor"),
    "no boxes": (lambda i: i["tensors"]["model/a"].pop("boxes"), "lacks boxes"),
    "a list of tensors": (lambda i: i.__setitem__("tensors", []), "not an object"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, kind: str) -> None:
    change, reason = INDICES[kind]
    path = _saved(tmp_path)
    _with_index(path, change)
    with pytest.raises(UserError) as error:
        read_full(path)
    assert reason in str(error.value) and len(error.value.problems) == 1
    target = {"model/a": GlobalTensor.of(torch.zeros(3, 4))}
    with pytest.raises(UserError):
        checkpointer(tmp_path).load(path, target)
    assert not target["model/a"].local.any()


# The tensors ----------------------------------------------------------------------------------------------------

DTYPES = [*checkpoint_tensors.DTYPES.values()]


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {}
    for dtype in DTYPES:
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (7 * 16,), generator=draw, dtype=torch.uint8)
        values[f"model/{dtype}"] = raw.view(dtype).view(7, -1)
    write_full(tmp_path / "all", values, {})
    found, _ = read_full(tmp_path / "all")
    assert all(
        f.dtype == values[n].dtype and torch.equal(f.view(torch.uint8), values[n].view(torch.uint8))
        for n, f in found.items()
    )
    with pytest.raises(ValueError, match=r"torch\.complex64 cannot be saved"):
        write_full(tmp_path / "complex", {"model/c": torch.zeros(2, dtype=torch.complex64)}, {})


def test_slices_are_read_in_small_pieces_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice of a 3-D tensor, with room for 40 bytes at a time, against indexing."""
    whole = torch.randn(4, 5, 6)
    write_full(tmp_path / "t", {"model/t": whole}, {})
    monkeypatch.setattr(checkpoint_tensors, "_STAGE_BYTES", 40)
    slices = CheckpointSlices(tmp_path / "t", {"t": (4, 5, 6)})
    for offsets, sizes in [
        ((0, 0, 0), (4, 5, 6)),
        ((1, 0, 0), (2, 5, 6)),
        ((0, 2, 0), (4, 2, 6)),
        ((1, 1, 3), (3, 3, 2)),
    ]:
        place = Placement((4, 5, 6), offsets, sizes)
        assert torch.equal(slices.read("t", place), place.of(whole))


def test_a_tensor_file_that_ends_early_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    slices = CheckpointSlices(path, {"a": (3, 4)})
    os.truncate(path / "rank-00000-0.safetensors", 20)
    with pytest.raises(UserError, match=r"rank-00000-0\.safetensors ends at byte"):
        slices.read("a", Placement.whole((3, 4)))


def test_a_state_that_is_no_json_fails_the_save(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(1, {"model/a": GlobalTensor.of(torch.zeros(1))}, {"loss": float("nan")})
    with pytest.raises(CheckpointError, match="JSON"):
        saver.wait()
