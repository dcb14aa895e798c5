"""The abort word of a rank's record ends every kind of wait, those inside torch too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pentad.parallel.comm.collectives import all_reduce, receive
from pentad.parallel.comm.lane import Lane
from pentad.parallel.comm.mesh import Mesh
from pentad.parallel.comm.waiting import Abort, Aborted, Overdue
from pentad.parallel.record.ring import Recorder
from pentad.parallel.record.vitals import ABORT_WORD, Heart
from pentad.trainer.checkpoint.team import Team
from pentad.trainer.processes.threads import Beside
from pentad.trainer.setup import mesh_of
from tests.distributed import job_store, run_distributed
from tests.training import job


def _writer(mesh: Mesh) -> None:
    writer = Beside("writer")
    writer.run(lambda: time.sleep(3))
    writer.join(mesh.abort)


def _raw_gloo(mesh: Mesh) -> None:
    """What FSDP2 does: it waits inside torch, where nothing looks at the abort."""
    dist.all_reduce(torch.ones(4), group=mesh.axis("dp").group)


WAITS: dict[str, Callable[[Mesh], Any]] = {
    "collective": lambda mesh: all_reduce(torch.ones(4), mesh.axis("dp")).wait(),
    "transfer": lambda mesh: receive(torch.ones(4), mesh.axis("dp"), 1).wait(),
    "barrier": lambda mesh: mesh.barrier(),
    "lane": lambda mesh: Lane("x", "cpu", abort=mesh.abort).submit(lambda: time.sleep(3)).wait(),
    "checkpoint": lambda mesh: Team(mesh.checkpoint_group, 0, 2, mesh.abort).together("saving", lambda: None),
    "writer": _writer,
    "inside torch": _raw_gloo,
}


def _told(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Rank 0 waits for what never comes, again and again; what each wait ended with."""
    ended: dict[str, str] = {}
    for epoch, (name, wait) in enumerate(WAITS.items()):
        recorder = Recorder(None, rank=rank, world=world, entries=64, epoch=epoch)
        mesh = mesh_of(job(dp=2), store=job_store(), rank=rank, device="cpu", recorder=recorder, epoch=epoch)
        if rank == 0:
            heart = Heart(recorder.vitals)
            threading.Timer(0.1, _tell, (recorder, epoch)).start()
            begin = time.monotonic()
            try:
                wait(mesh)
            except Exception as error:
                ended[name] = type(error).__name__
            assert time.monotonic() - begin < 2.5, name
            heart.close()
            (folder / name).touch()
        while not (folder / name).exists():
            time.sleep(0.01)
        mesh.close()
    return ended


def _tell(recorder: Recorder, epoch: int) -> None:
    recorder._words[ABORT_WORD] = epoch + 1


@pytest.mark.distributed
def test_every_kind_of_wait_ends_with_the_abort_word(tmp_path: Path) -> None:
    ended, _ = run_distributed(_told, 2, tmp_path, group=False)
    assert ended == {**dict.fromkeys(WAITS, "Aborted"), "inside torch": "RuntimeError"}


def test_a_mesh_that_is_being_set_up_can_be_left() -> None:
    """Rank 1 never comes."""
    recorder = Recorder(None, rank=0, world=2, entries=8)
    heart = Heart(recorder.vitals)
    threading.Timer(0.2, _tell, (recorder, 0)).start()
    store = dist.HashStore()
    with pytest.raises(Aborted, match="setting up the mesh"):
        mesh_of(job(dp=2), store=store, rank=0, device="cpu", recorder=recorder)
    heart.close()


def test_an_abort_of_another_epoch_ends_nothing() -> None:
    recorder, told = Recorder(None, rank=0, world=1, entries=8), []
    recorder.vitals.listen(3, lambda: told.append("now"), lambda: None)
    _tell(recorder, 2)
    recorder.vitals.beat()
    assert told == []
    _tell(recorder, 3)
    recorder.vitals.beat()
    assert told == ["now"]


def test_who_waits_too_long_is_told_for_whom() -> None:
    with pytest.raises(Overdue, match=r"waited 1 s \(faults.timeout_s\) for rank 5"):
        Abort(1.0).check("all_reduce over dp", 2.0, lambda: "rank 5")
    with pytest.raises(Overdue, match="pentad diagnose RUN says for which"):
        Abort(1.0).check("all_reduce over dp", 2.0)


def test_what_blocks_is_called_beside_and_its_result_and_error_come_back() -> None:
    abort = Abort()
    assert abort.beside("x", lambda: threading.current_thread() is not threading.main_thread()) is True
    with pytest.raises(KeyError, match="mine"):
        abort.beside("x", lambda: {}["mine"])
