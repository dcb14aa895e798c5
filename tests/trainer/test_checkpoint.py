"""Saving in one layout and loading in another, on several ranks; asynchronous saves; failures of one rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pentad.configs.errors import UserError
from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer import checkpoint_plan
from pentad.trainer.checkpoint import CheckpointError, read_full, verify
from tests.distributed import run_distributed
from tests.trainer.checkpoint_layouts import checkpointer, global_values, pieces, same

pytestmark = pytest.mark.distributed


def _loads(rank: int, world: int, path: Path, layouts: list[tuple[str, int]]) -> None:
    """Every layout of this world gets exactly the global values out of `path`."""
    values, saver = global_values(), checkpointer(path.parent)
    assert saver.find_resume("latest") == path
    for layout, tp in layouts:
        mine = pieces(layout, tp, rank, world, None)
        state = saver.load(path, mine)
        assert same(mine, pieces(layout, tp, rank, world, values)), (layout, tp)
        assert state == {"step": 10, "tokens": 123, "nested": {"a": [1, 2.5, None]}}


def _save_and_reshard(rank: int, world: int, folder: Path) -> None:
    saver = checkpointer(folder, asynchronous=True)
    mine = pieces("zero1", 2, rank, world, global_values())
    saver.save(10, mine, {"tokens": 123, "nested": {"a": [1, 2.5, None]}})
    for piece in mine.values():  # training goes on while the checkpoint is written
        piece.local.add_(1)
    saver.close()
    path = folder / "step-00000010"
    layouts = [("zero1", 2), ("zero1", 1), ("zero1", 4), ("ddp", 1), ("ddp", 4), ("fsdp", 1), ("fsdp", 2)]
    _loads(rank, world, path, layouts)


def test_any_layout_to_any_layout(tmp_path: Path) -> None:
    run_distributed(_save_and_reshard, 4, tmp_path)
    path = tmp_path / "step-00000010"
    assert verify(path) == []
    whole, state = read_full(path)
    assert state["step"] == 10
    values = global_values()
    assert whole.keys() == values.keys() and all(torch.equal(whole[n], values[n]) for n in values)
    run_distributed(_loads, 2, path, [("zero1", 2), ("fsdp", 1), ("ddp", 1)])
    saver = checkpointer(tmp_path)
    alone = pieces("ddp", 1, 0, 1, None)
    saver.load(path, alone)
    assert same(alone, pieces("ddp", 1, 0, 1, values))


def _save_each(rank: int, world: int, folder: Path) -> None:
    for i, (layout, tp) in enumerate([("ddp", 1), ("ddp", 4), ("fsdp", 2), ("mixed", 2), ("mixed", 1)]):
        saver = checkpointer(folder / str(i))
        saver.save(i, pieces(layout, tp, rank, world, global_values(i)), {})


def test_replicas_are_written_once_even_where_they_are_cut_differently(tmp_path: Path) -> None:
    run_distributed(_save_each, 4, tmp_path)
    for i in range(5):
        path = tmp_path / str(i) / f"step-{i:08d}"
        assert verify(path) == []
        values = global_values(i)
        whole, _ = read_full(path)
        assert all(torch.equal(whole[n], values[n]) for n in values)
        metadata = FileSystemReader(path).read_metadata()
        for name, about in metadata.state_dict_metadata.items():
            assert sum(c.sizes.numel() for c in about.chunks) == values[name].numel()  # pyright: ignore
        ranks = {info.relative_path.split("_")[2] for info in metadata.storage_data.values()}
        assert ranks == {"0", "1", "2", "3"}, "replicas are dealt out over the ranks"


def _against_dtensor(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(77.0).reshape(7, 11)  # uneven in both dimensions
    theirs = distribute_tensor(whole, mesh, [Shard(1), Shard(0)])
    save({"w": theirs}, checkpoint_id=folder / "theirs")
    place = Placement((7, 11), (0, 0), (7, 6)) if rank < 2 else Placement((7, 11), (0, 6), (7, 5))
    local = place.of(whole).reshape(-1)
    run = (0, 19) if rank % 2 else (19, len(local))
    data = torch.zeros(run[1] - run[0])
    load({"w": GlobalTensor(place, *run, data)}, checkpoint_id=folder / "theirs")
    assert torch.equal(data, local[run[0] : run[1]])

    checkpointer(folder).save(1, {"w": GlobalTensor(place, *run, data)}, {})
    back = {"w": distribute_tensor(torch.zeros(7, 11), mesh, [Replicate(), Shard(0)])}
    load(back, checkpoint_id=folder / "step-00000001")
    loaded = back["w"]
    assert isinstance(loaded, DTensor) and torch.equal(loaded.full_tensor(), whole)


def test_torchs_own_tensors_read_ours_and_we_read_theirs(tmp_path: Path) -> None:
    run_distributed(_against_dtensor, 4, tmp_path)


def _failing(rank: int, world: int, folder: Path) -> list[str]:
    saver = checkpointer(folder, asynchronous=True)
    saver.save(1, pieces("zero1", 1, rank, world, global_values(1)), {})
    saver.wait()
    true_fsync = os.fsync

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        os.fsync = full
    try:
        saver.save(2, pieces("zero1", 1, rank, world, global_values(2)), {})
        assert saver.newest == 2
        with pytest.raises(CheckpointError, match="No space left"):
            saver.wait()
        assert saver.newest is None
    finally:
        os.fsync = true_fsync
    dist.barrier()
    left = sorted(p.name for p in folder.iterdir())
    saver.save(3, pieces("zero1", 1, rank, world, global_values(3)), {})
    saver.close()
    with pytest.raises(CheckpointError, match="JSON"):
        saver.save(4, {}, {"step": object()} if rank == 1 else {})
        saver.wait()
    return left


def test_the_failure_of_one_rank_reaches_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    left = run_distributed(_failing, 2, tmp_path)
    assert left == [["step-00000001"]] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert verify(tmp_path / "step-00000003") == []


def _disagreeing(rank: int, world: int, folder: Path) -> list[str]:
    values, saver, seen = global_values(), checkpointer(folder), []
    mine = pieces("zero1", 1, rank, world, values)
    for change in ("shape", "hole"):
        wrong = dict(mine)
        if rank == 1:
            name = next(iter(wrong))
            if change == "hole":
                del wrong[name]
            else:
                wrong[name] = GlobalTensor.of(torch.zeros(3))
        with pytest.raises(CheckpointError) as error:
            saver.save(1, wrong, {})
        seen.append(str(error.value))
    saver.save(1, mine, {})
    if rank == 1:
        mine["model/extra"] = GlobalTensor.of(torch.zeros(3))
    with pytest.raises(UserError) as mistake:
        saver.load(folder / "step-00000001", mine)
    with pytest.raises(UserError, match="does not exist"):
        saver.find_resume(folder / "step-00000007")
    return [*seen, str(mistake.value)]


def test_disagreements_between_ranks_are_named_on_every_rank(tmp_path: Path) -> None:
    first, second = run_distributed(_disagreeing, 2, tmp_path)
    assert first == second
    assert "(3,)" in first[0] and "elements, the ranks together hold" in first[1]
    assert "model/extra (3,)" in first[2] and "the checkpoint does not have it" in first[2]


def _killed(rank: int, world: int, folder: Path) -> None:
    saver = checkpointer(folder, asynchronous=True)
    saver.save(1, pieces("zero1", 1, rank, world, global_values(1)), {})
    saver.wait()
    if rank == 1:
        checkpoint_plan.PlannedSave.resolve_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # pyright: ignore
    saver.save(2, pieces("zero1", 1, rank, world, global_values(2)), {})
    with pytest.raises(CheckpointError):
        saver.wait()
    (folder / "survivor").touch()


def test_a_rank_killed_while_writing_costs_only_that_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_distributed(_killed, 2, tmp_path)
    assert (tmp_path / "survivor").exists()
    saver = checkpointer(tmp_path)
    assert saver.find_resume("latest") == tmp_path / "step-00000001"
    values = global_values(1)
    whole, _ = read_full(tmp_path / "step-00000001")
    assert all(torch.equal(whole[n], values[n]) for n in values)
