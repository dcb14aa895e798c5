"""Copies of a state are read back to the bit, the older one stays whole, and what is damaged is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer.checkpoint.same_run import RunProgress
from pentad.trainer.recovery.copy_file import NoSnapshot, read_copies
from pentad.trainer.recovery.point import RunPoint
from pentad.trainer.recovery.relaying import cover, fill_from
from pentad.trainer.recovery.snapshots import Snapshot, SnapshotFile, snapshots_by_step, snapshots_on_node


def point(step: int) -> RunPoint:
    return RunPoint(RunProgress(step, step - 1, 64 * step, 1), {"step": 2, "loss": 3.5}, 0)


def state(seed: int) -> dict[str, GlobalTensor]:
    """A flat memory of two pieces, a counter, an empty piece and a half-precision one."""
    draws = torch.Generator().manual_seed(seed)
    flat = torch.randn(24, dtype=torch.float64, generator=draws)
    slice_ = Placement.shard((6, 8), 0, 1, 2)
    return {
        "model/a": GlobalTensor(slice_, 4, 16, flat[:12]),
        "optim/m/a": GlobalTensor(slice_, 4, 16, flat[12:]),
        "model/n": GlobalTensor.of(torch.tensor(seed)),
        "model/none": GlobalTensor(slice_, 0, 0, flat[:0]),
        "model/b": GlobalTensor.of(torch.randn(3, generator=draws).bfloat16()),
    }


def values(tensors: dict[str, GlobalTensor]) -> dict[str, torch.Tensor]:
    return {name: piece.local.clone() for name, piece in tensors.items()}


def snapshots_of(folder: Path, slot: int) -> dict[int, Snapshot]:
    return snapshots_on_node(folder).get(slot, {})


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_two_newest_copies_are_there_to_the_bit(tmp_path: Path) -> None:
    mine, wanted = state(0), {}
    file = SnapshotFile(tmp_path, 7, mine)
    assert not snapshots_of(tmp_path, 3)
    for step in range(1, 5):
        for piece in mine.values():
            piece.local.add_(1)
        wanted[step] = values(mine)
        file.write(point(step), epoch=2, slot=3)
    found = snapshots_of(tmp_path, 3)
    assert sorted(found) == [3, 4] and not snapshots_of(tmp_path, 2)
    for step, snapshot in found.items():
        other = state(5)
        snapshot.fill(other)
        assert same(values(other), wanted[step])
        assert (snapshot.point, snapshot.copy.seal.epoch) == (point(step), 2)
    file.close()
    assert sorted(snapshots_of(tmp_path, 3)) == [3, 4]


def test_a_copy_that_was_broken_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = state(0)
    file = SnapshotFile(tmp_path, 0, mine)
    file.write(point(1), 0, 0)
    file.write(point(2), 0, 0)

    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("pentad.trainer.recovery.snapshots._memory", killed)
    with pytest.raises(KeyboardInterrupt):
        file.write(point(3), 0, 0)
    assert sorted(snapshots_of(tmp_path, 0)) == [2]


def test_a_flipped_bit_anywhere_in_a_copy_makes_it_none(tmp_path: Path) -> None:
    file = SnapshotFile(tmp_path, 0, state(0))
    file.write(point(1), 0, 0)
    path = file.file.path
    whole = path.read_bytes()
    (only,) = read_copies(path)
    assert only.is_sound
    start = whole.index(bytes(only.state))
    used = [*range(64, 128), *range(4096, 4200), *range(start, start + len(only.state)), 0, 9, 14, 20, 25]
    for at in used:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        assert not snapshots_of(tmp_path, 0), at
    path.write_bytes(whole[:-1])
    with pytest.raises(NoSnapshot):
        read_copies(path)


def test_the_latest_epoch_counts_and_other_pieces_are_refused(tmp_path: Path) -> None:
    for number, epoch in ((0, 0), (9, 2), (4, 1)):
        file = SnapshotFile(tmp_path, number, state(number))
        file.write(point(1), epoch, 0)
    found = snapshots_of(tmp_path, 0)[1]
    other = state(1)
    found.fill(other)
    assert other["model/n"].local.item() == 9
    other["model/a"] = GlobalTensor(other["model/a"].placement, 5, 16, other["model/a"].local[1:])
    with pytest.raises(NoSnapshot, match="piece of model/a"):
        found.fill(other)
    with pytest.raises(NoSnapshot, match="5 pieces, this rank has 4"):
        found.fill({name: piece for name, piece in state(1).items() if name != "model/b"})


def test_a_file_follows_the_same_pieces_to_other_memory(tmp_path: Path) -> None:
    one, two = ({"a": GlobalTensor.of(torch.full((4,), value))} for value in (1.0, 2.0))
    file = SnapshotFile(tmp_path, 0, one)
    file.write(point(1), 0, 0)
    assert not file.follow({"a": GlobalTensor.of(torch.zeros(5))}) and file.follow(two)
    file.write(point(2), 0, 0)
    three = {"a": GlobalTensor.of(torch.zeros(4))}
    for step, value in ((2, 2.0), (1, 1.0)):
        snapshots_of(tmp_path, 0)[step].fill(three)
        assert three["a"].local.tolist() == [value] * 4


def test_who_goes_back_has_no_copy_of_what_will_be_done_again(tmp_path: Path) -> None:
    file = SnapshotFile(tmp_path, 0, state(0))
    file.write(point(4), 0, 0)
    file.write(point(5), 0, 0)
    file.go_back(4)
    assert sorted(snapshots_of(tmp_path, 0)) == [4]
    file.write(point(4), 1, 0)
    assert [copy.seal.epoch for copy in read_copies(file.file.path)] == [1]


def test_pieces_are_found_in_copies_of_other_layouts_that_overlap(tmp_path: Path) -> None:
    """A (10, 10) tensor, of which three ranks of one layout and two of another had runs: what is nowhere is missed,
    though as many elements are there as are wanted."""
    whole, place = torch.arange(100.0), Placement.whole((10, 10))
    runs = {0: [(0, 34), (34, 68), (68, 100)], 1: [(0, 50), (25, 75)]}
    for epoch, of_ranks in runs.items():
        for rank, (start, stop) in enumerate(of_ranks):
            piece = GlobalTensor(place, start, stop, whole[start:stop].clone())
            SnapshotFile(tmp_path, 10 * epoch + rank, {"a": piece}).write(point(3), epoch, rank)
    (wanted,) = [GlobalTensor(place, 11, 100, torch.zeros(89))]
    copies = snapshots_by_step(tmp_path)[3]
    assert [copy.copy.seal.epoch for copy in copies] == [1, 1, 0, 0, 0]
    parts = cover(copies, {"a": wanted})
    assert parts is not None
    fill_from(parts, {"a": wanted})
    assert torch.equal(wanted.local, whole[11:])
    assert cover([each for each in copies if each.copy.seal.epoch], {"a": wanted}) is None
    assert cover(copies, {"b": wanted}) is None
    assert cover(copies, {"a": GlobalTensor(place, 0, 100, torch.zeros(100, dtype=torch.float64))}) is None
