"""Copies of a state are read back to the bit, the older one stays whole, and what is damaged is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer.checkpoint.same_run import RunProgress
from pentad.trainer.recovery.copy_file import NoSnapshot, read_copies
from pentad.trainer.recovery.pieces import TensorPiece
from pentad.trainer.recovery.point import RunPoint
from pentad.trainer.recovery.snapshots import Snapshot, SnapshotFile, copy_index, snapshots_on_node, stored_pieces


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
    """By step, of several of a step that of the latest mesh."""
    found = [each for each in snapshots_on_node(folder) if each.copy.seal.slot == slot and each.copy.is_sound]
    return {each.point.step: each for each in reversed(found)}


def described(index: bytes) -> dict[str, TensorPiece]:
    return {stored.name: stored.piece for stored in stored_pieces(index)}


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
        assert same(values(snapshot.tensors), wanted[step])
        assert described(copy_index(snapshot.tensors)) == described(copy_index(mine))
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


def test_copies_of_later_meshes_come_first_and_others_files_are_passed_over(tmp_path: Path) -> None:
    for number, epoch in ((0, 0), (9, 2), (4, 1)):
        SnapshotFile(tmp_path, number, state(number)).write(point(1), epoch, 0)
    found = snapshots_on_node(tmp_path)
    assert [(each.number, each.copy.seal.epoch) for each in found] == [(9, 2), (4, 1), (0, 0)]
    assert [each.tensors["model/n"].local.item() for each in found] == [9, 4, 0]
    assert [each.number for each in snapshots_on_node(tmp_path, (9, 0))] == [4]


def test_a_file_follows_the_same_pieces_to_other_memory(tmp_path: Path) -> None:
    one, two = ({"a": GlobalTensor.of(torch.full((4,), value))} for value in (1.0, 2.0))
    file = SnapshotFile(tmp_path, 0, one)
    file.write(point(1), 0, 0)
    assert not file.follow({"a": GlobalTensor.of(torch.zeros(5))}) and file.follow(two)
    file.write(point(2), 0, 0)
    for step, value in ((2, 2.0), (1, 1.0)):
        assert snapshots_of(tmp_path, 0)[step].tensors["a"].local.tolist() == [value] * 4


def test_who_goes_back_has_no_copy_of_what_will_be_done_again(tmp_path: Path) -> None:
    file = SnapshotFile(tmp_path, 0, state(0))
    file.write(point(4), 0, 0)
    file.write(point(5), 0, 0)
    file.go_back(4)
    assert sorted(snapshots_of(tmp_path, 0)) == [4]
    file.write(point(4), 1, 0)
    assert [copy.seal.epoch for copy in read_copies(file.file.path)] == [1]
