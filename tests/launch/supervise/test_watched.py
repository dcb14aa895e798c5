"""A rank as its node's watcher sees it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pentad.launch.supervise.watched import WatchedRank, still_standing
from pentad.parallel.record import files, ring
from pentad.parallel.record.patience import Patience
from pentad.parallel.record.stand import Condition


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


def test_a_rank_that_comes_on_while_others_are_looked_at_is_not_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "ring_folders", lambda: (tmp_path, tmp_path))
    recorders = [ring.create("run", rank=rank, world=2, entries=8) for rank in range(2)]
    ranks = {r.rank: WatchedRank(r.path, Patience(1.0, 1.0, 1.0), "host") for r in recorders if r.path is not None}
    for recorder, rank in zip(recorders, ranks.values(), strict=True):
        recorder.vitals.enter("step")
        rank.look(time.monotonic() - 5)
    stands = {number: rank.stand(time.monotonic(), Condition.RUNS) for number, rank in ranks.items()}
    assert all(stand.late and stand.idle_s > 4 for stand in stands.values())
    recorders[1].enter(recorders[1].intern("F"))
    still = still_standing(stands, ranks)
    assert still[0].late and still[0].idle_s > 4
    assert not still[1].late and still[1].idle_s < 1
    for rank in ranks.values():
        rank.close()


def test_a_rank_between_two_meshes_is_not_late_and_is_seen_where_it_stays_or_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "ring_folders", lambda: (tmp_path, tmp_path))
    recorder = ring.create("run", rank=0, world=2, entries=8)
    assert recorder.path is not None
    recorder.vitals.enter("step")
    watched = WatchedRank(recorder.path, Patience(1.0, 10.0, 1.0), "host")
    now = time.monotonic()
    watched.look(now)
    assert not watched.on_its_way and watched.late(now + 11)
    watched.goes_to(0, 1, now)
    assert watched.on_its_way and not watched.late(now + 11)
    assert not watched.stays(now + 9) and watched.stays(now + 11)
    assert watched.alone_s(now + 9) == 0
    recorder.vitals.out()
    assert not watched.stays(now + 11), "it waits for the plan"
    assert 8 < watched.alone_s(now + 9) < 10
    recorder.vitals.goes_on()
    recorder.epoch = 1
    assert watched.on_its_way and not watched.stays(now + 11), "it has met the others and builds nothing yet"
    recorder.vitals.enter("load")
    watched.look(time.monotonic())
    assert not watched.on_its_way and watched.alone_s(now + 9) == 0
    recorder.close()
    watched.close()
