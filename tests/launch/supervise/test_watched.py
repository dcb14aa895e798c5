"""A rank as its node's watcher sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pentad.launch.supervise.watched import WatchedRank
from pentad.parallel.record import files, ring
from pentad.parallel.record.patience import Patience


def test_the_ring_of_a_dead_rank_is_its_watchers_until_it_has_kept_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "ring_folders", lambda: (tmp_path, tmp_path))
    recorder = ring.create("run", rank=0, world=2, entries=8)
    path = recorder.path
    assert path is not None
    watched = WatchedRank(path, Patience(1.0, 1.0, 1.0), "host")
    monkeypatch.setattr(files.ProcessId, "alive", False)
    del recorder
    assert files.sweep() == [] and path.exists()  # by a job that starts
    watched.close()
    del watched
    assert files.sweep() == [path]
