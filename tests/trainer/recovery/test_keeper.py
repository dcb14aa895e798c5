"""A rank without room for copies trains on without them, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pentad.trainer.checkpoint.same_run import RunProgress
from pentad.trainer.checkpoint.state import all_tensors
from pentad.trainer.recovery.keeper import SnapshotKeeper
from pentad.trainer.recovery.point import RunPoint
from pentad.trainer.recovery.snapshots import snapshots_on_node
from pentad.trainer.session import Session
from tests.training import job, make_here


def _kept(folder: Path) -> list[int]:
    """The steps of which there are copies after five steps."""
    session = Session.open(cfg := job(), [0], 0, here=make_here(0, cfg))
    keeper = SnapshotKeeper(folder, 0)
    tensors = all_tensors(session.parts, session.optimizer)
    keeper.begin(session.mesh, (0,), tensors, RunPoint(RunProgress(0, 0, 0, 0)))
    for step in range(1, 6):
        keeper.arrived()
        keeper.every = 1
        keeper.after(RunPoint(RunProgress(step, step, step, 0)))
    keeper.close()
    session.close()
    return sorted(each.point.step for each in snapshots_on_node(folder) if each.copy.seal.slot == 0)


def test_the_newest_two_steps_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _kept(tmp_path) == [4, 5] and "no room" not in capsys.readouterr().err


def test_without_room_nothing_is_kept_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _kept(tmp_path / "absent") == []
    assert "no room for copies of the state" in capsys.readouterr().err
