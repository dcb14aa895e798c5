"""`pentad train` with recovery: a whole job whose ranks are killed ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from .whole_jobs import (
    RECOVER,
    STEPS,
    TORCHRUN,
    assert_same_end,
    events,
    kill,
    lines,
    start,
    undisturbed,
    until_recovered,
    until_step,
)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_whose_ranks_are_killed_ends_with_the_same_curve_and_bits(tmp_path: Path) -> None:
    hurt, run = start(tmp_path, "hurt", *RECOVER), tmp_path / "hurt"
    try:
        for slot, step in ((0, 5), (1, 25)):
            until_step(run, step, hurt)
            kill(run, slot)
        _, errors = hurt.communicate(timeout=120)
    finally:
        hurt.kill()
    assert hurt.returncode == 0, errors
    assert_same_end(run, undisturbed(tmp_path))
    assert [event["ranks"] for event in events(run, "fault")] == [[0], [1]]
    assert [event["epoch"] for event in events(run, "recovered")] == [1, 2]
    assert not list(Path("/dev/shm").glob("pentad-hurt-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_that_shrinks_and_grows_back_ends_with_the_same_curve_and_bits(tmp_path: Path) -> None:
    elastic = ["train.deterministic=elastic", "train.steps=600", "parallel.dp=4", "train.global_batch=12"]
    ladder = ["faults.recover=true", "faults.ladder=[spare,shrink,respawn]"]
    hurt, run = start(tmp_path, "hurt", *elastic, *ladder), tmp_path / "hurt"
    try:
        for slot, epoch in ((2, 0), (0, 2)):
            if epoch:
                until_recovered(run, epoch, hurt)
            else:
                until_step(run, 5, hurt)
            kill(run, slot)
        _, errors = hurt.communicate(timeout=240)
    finally:
        hurt.kill()
    assert hurt.returncode == 0, errors
    assert_same_end(run, undisturbed(tmp_path, *elastic), 600)
    told = events(run, "recovered")
    assert [event["rung"] for event in told][:3] == ["shrink", "grow", "shrink"]
    assert told[0]["layout"] == "dp=3" and told[1]["layout"] == "" and told[1]["redone"] == 0
    assert not list(Path("/dev/shm").glob("pentad-hurt-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_does_not_hear_of_a_fault_that_is_mended(tmp_path: Path) -> None:
    hurt, run = start(tmp_path, "torchrun", *RECOVER, launcher=TORCHRUN), tmp_path / "torchrun"
    try:
        until_step(run, 5, hurt)
        kill(run, 0)
        _, errors = hurt.communicate(timeout=120)
    finally:
        hurt.kill()
    assert hurt.returncode == 0, errors
    assert "fault: rank 0 was killed by SIGKILL" in errors
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [*range(1, STEPS + 1)]
    assert not list(Path("/dev/shm").glob("pentad-torchrun-*"))
