"""Saving in one layout and loading in another, on several ranks; asynchronous saves; failures of one rank."""

from __future__ import annotations

import math
import os
import pickle
import resource
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pentad.configs.errors import UserError
from pentad.parallel.comm.waiting import Abort, Aborted
from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer.checkpoint import io
from pentad.trainer.checkpoint.checkpointer import CheckpointError, read_full, verify
from pentad.trainer.checkpoint.index import read_contents
from pentad.trainer.checkpoint.team import Team
from tests.distributed import host_tree, run_distributed
from tests.trainer.checkpoint.layouts import checkpointer, global_values, killed_before_change, pieces, same

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
        stored = read_contents(path).tensors
        for name, about in stored.items():
            assert sum(math.prod(box.sizes) for box in about.boxes) == values[name].numel()
        ranks = {box.file.split("-")[1].lstrip("0") or "0" for about in stored.values() for box in about.boxes}
        assert ranks == {"0", "1", "2", "3"}, "replicas are dealt out over the ranks"


def _save_slices(rank: int, world: int, folder: Path) -> None:
    checkpointer(folder).save(1, pieces("mixed", 2, rank, world, global_values()), {})


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    """The safetensors library finds every box, named by what it is of the global tensor, with its values."""
    run_distributed(_save_slices, 4, tmp_path)
    values, seen = global_values(), {name: torch.zeros_like(value) for name, value in global_values().items()}
    for file in (tmp_path / "step-00000001").glob("*.safetensors"):
        for key, box in load_file(file).items():
            name, _, cut = key.removesuffix("]").partition("[")
            spans = tuple(slice(*map(int, span.split(":"))) for span in cut.split(", ")) if cut else ()
            assert torch.equal(values[name][spans], box)
            seen[name][spans] += 1
    assert all(bool((counts == 1).all()) for counts in seen.values())


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
        with pytest.raises(CheckpointError, match=r"rank 1: OSError: .*No space left"):
            saver.wait()
        assert saver.newest is None
    finally:
        os.fsync = true_fsync
    dist.barrier()
    left = sorted(p.name for p in folder.iterdir())
    saver.save(3, pieces("zero1", 1, rank, world, global_values(3)), {})
    saver.close()
    saver.save(4, {}, {"step": object()} if rank == 1 else {})
    with pytest.raises(CheckpointError, match="JSON"):
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
        saver.save(1, wrong, {})
        with pytest.raises(CheckpointError) as error:
            saver.wait()
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
        io.write_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # pyright: ignore
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


def _killed_at_a_change(rank: int, world: int, folder: Path, victim: int, number: int) -> None:
    saver = checkpointer(folder)
    saver.save(1, pieces("zero1", 1, rank, world, global_values(1)), {})
    if rank == victim:
        killed_before_change(number)
    saver.save(2, pieces("zero1", 1, rank, world, global_values(2)), {})
    if rank == victim:
        (folder / f"through-{number}").touch()
        os._exit(0)  # what it was counted for is over


@pytest.mark.sample(2)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", range(1, 26))
def test_a_rank_killed_at_any_change_of_the_disk_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, victim: int, number: int
) -> None:
    with suppress(RuntimeError):
        run_distributed(_killed_at_a_change, 2, tmp_path, victim, number)
    found = checkpointer(tmp_path).find_resume("latest")
    assert found is not None and verify(found) == []
    step = int(found.name.removeprefix("step-"))
    assert step == 2 or not (tmp_path / f"through-{number}").exists(), "a save that got through is there"
    values = global_values(step)
    whole, _ = read_full(found)
    assert all(torch.equal(whole[n], values[n]) for n in values)


def _without_memory(rank: int, world: int, folder: Path) -> str:
    saver = checkpointer(folder, asynchronous=True)
    whole = torch.ones(world, 3 << 20)
    mine = GlobalTensor(Placement.shard((world, 3 << 20), 0, rank, world), 0, 3 << 20, whole[rank])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 20), limits[1]))
    try:
        saver.save(1, {"model/a": mine}, {})
        with pytest.raises(CheckpointError) as error:
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    saver.save(2, {"model/a": mine}, {})
    saver.wait()
    saver.close()
    return str(error.value)


def test_a_rank_without_memory_fails_the_save_on_every_rank_and_the_next_one_works(tmp_path: Path) -> None:
    first, second = run_distributed(_without_memory, 2, tmp_path)
    assert first == second and "rank 1: MemoryError" in first
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"] and verify(tmp_path / "step-00000002") == []


def _answers(rank: int, world: int) -> list[str]:
    team = Team(host_tree(), rank, world)
    told: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    for place in ("dumps", "empty", "loads"):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(torch if place == "empty" else pickle, place, fail)
            with pytest.raises(CheckpointError) as error:
                team.together("saving", lambda: rank)
        told.append(str(error.value))
        assert team.together("saving", lambda: rank) == [0, 1]
    return told


def test_an_answer_for_which_one_rank_has_no_memory_is_no_ones_and_the_next_one_is_everybodys() -> None:
    first, second = run_distributed(_answers, 2)
    assert len(first) == 3 and all(text.startswith("saving: rank 1: ") for text in first + second)


def _ended(rank: int, world: int, done: Path) -> float:
    """Rank 1 is there and never comes."""
    group = host_tree()
    begin = time.monotonic()
    while rank == 1 and not done.exists() and time.monotonic() - begin < 60:
        time.sleep(0.05)
    if rank == 0:
        for abort, reason in ((Abort(600.0), "the watcher says so"), (Abort(0.2), "waited 0.2 s")):
            if abort.timeout_s == 600.0:
                threading.Timer(0.2, abort.trigger, [reason]).start()
            with pytest.raises((Aborted, CheckpointError), match=reason):
                Team(group, rank, world, abort).together("saving", lambda: None)
        done.touch()
    return time.monotonic() - begin


def test_the_wait_for_another_rank_can_be_ended(tmp_path: Path) -> None:
    assert max(run_distributed(_ended, 2, tmp_path / "done")) < 60
