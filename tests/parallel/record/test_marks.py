"""What the entries tell of waiting: when a rank began to wait, when the last peer came, what a thread computed."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import numpy as np
import torch

from pentad.parallel.comm.collectives import all_gather, all_reduce, receive, send
from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.record import kinds, reader
from pentad.parallel.record.garbage import recorded_collections
from pentad.parallel.record.ring import BESIDE, Recorder
from tests.distributed import job_store, run_distributed
from tests.rows import without_copies

_LATE_S = 0.2


def test_marks_are_in_the_entry_and_the_first_ones_count(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    recorder = Recorder(path, rank=0, world=1, entries=4)
    kind = recorder.intern("all_gather")
    for _ in range(5):  # the fifth comes into the slot of the first
        ticket = recorder.enter(kind)
    recorder.waits(ticket)
    time.sleep(0.002)
    recorder.waits(ticket)
    recorder.exit(ticket, arrived=17, cpu=23)
    end = reader.read(path).entries[-1]["end"]
    recorder.exit(ticket, arrived=18)
    beside = recorder.fork().enter(kind)
    entries = reader.read(path).entries
    last = entries[entries["ticket"] == ticket][0]
    assert (last["arrived"], last["cpu"], last["end"]) == (17, 23, end)
    assert last["start"] <= last["waited"] <= last["end"] - 2_000_000
    assert entries[entries["ticket"] == beside][0]["flags"] == BESIDE
    fresh = entries[entries["ticket"] == beside][0]
    assert (fresh["waited"], fresh["arrived"], fresh["cpu"]) == (0, 0, 0)


def test_a_long_collection_of_garbage_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "r.ring"
    recorder = Recorder(path, rank=0, world=1, entries=64)
    with recorded_collections(recorder):
        cycles = [[] for _ in range(200_000)]
        for cycle in cycles:
            cycle.append(cycle)
        gc.collect()
    gc.collect()
    ring = reader.read(path)
    names = [ring.name(kind) for kind in ring.entries["kind"]]
    assert kinds.COLLECT in names
    assert (ring.entries["end"] - ring.entries["start"] >= 200_000).all()


def _until_waiting(folder: Path, *others: int, entries: int) -> None:
    """Returns when these ranks wait in the last of so many entries."""
    for other in others:
        while True:
            found = without_copies(reader.read(folder / f"{other}.ring"))
            if len(found) == entries and found[-1]["waited"]:
                break
            time.sleep(0.001)


def _late(rank: int, world: int, folder: Path) -> dict[str, list[float]]:
    """Rank 2 comes late to a large sum, a small one and a gather, and turns late to a sum that it started in time;
    rank 1 sends late."""
    recorder = Recorder(folder / f"{rank}.ring", rank=rank, world=world, entries=256)
    mesh = Mesh(Degrees(dp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder)
    axis = mesh.axis("dp")
    big, small = torch.ones(3 << 15), torch.ones(3)
    starts = (
        lambda: all_reduce(big, axis),
        lambda: all_reduce(small, axis),
        lambda: all_gather(small, axis),
        lambda: all_reduce(big, axis),
    )
    for done, start in enumerate(starts):
        handle = start() if rank < 2 or done == 3 else None
        if rank == 2:
            _until_waiting(folder, 0, 1, entries=done + 1)
            time.sleep(_LATE_S)
        (handle or start()).wait()
    if rank == 0:
        receive(small, axis, 1).wait()
    elif rank == 1:
        _until_waiting(folder, 0, entries=5)
        time.sleep(_LATE_S)
        send(small, axis, 0).wait()
    mesh.close()
    entries = without_copies(reader.read(folder / f"{rank}.ring"))
    waited, arrived, end = (entries[name].astype(np.float64) / 1e9 for name in ("waited", "arrived", "end"))
    return {
        "kept": (entries["waited"] > 0).tolist(),
        "for_others": np.clip(np.minimum(arrived, end) - waited, 0, None).tolist(),
        "moving": (end - np.maximum(waited, arrived)).tolist(),
    }


def test_waiting_for_a_late_rank_is_told_from_moving(tmp_path: Path) -> None:
    first, second, last = run_distributed(_late, 3, tmp_path, group=False)
    for marks in (first, second, last):
        assert all(marks["kept"])
        assert min(marks["moving"]) >= 0
    for entry in range(4):
        for waiting in (first, second):
            assert waiting["for_others"][entry] >= _LATE_S > last["for_others"][entry]
    received, sent = first["for_others"][4], second["for_others"][4]
    assert received >= _LATE_S > sent
