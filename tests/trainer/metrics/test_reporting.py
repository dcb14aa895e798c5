"""What the training loop hands to the sinks: of the right step, and of the worst rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pentad.configs.schema import Config, EvalConfig, LogConfig
from pentad.trainer.data.loader import Loader
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.metrics.readings import memory
from pentad.trainer.metrics.report import Report
from pentad.trainer.metrics.sinks import EventLog, SinkSet, make_sinks
from pentad.trainer.processes.signals import StopRequest
from tests.distributed import run_distributed
from tests.trainer.checkpoint.test_resume import text_job
from tests.training import Run, job, microbatches, open_trainer


class Rows:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, report: Report) -> None:
        self.rows.append(report.row)

    def add(self, report: Report) -> None: ...

    def close(self) -> None: ...


def _train(rank: int, world: int, cfg: Config, folder: Path) -> list[dict[str, Any]]:
    rows = Rows()
    session, trainer = open_trainer(rank, cfg, folder)
    try:
        sinks = make_sinks(cfg.log, folder, {}, cfg.train.steps) if rank == 0 else SinkSet([])
        sinks.sinks.append(rows)
        trainer.train(Outputs(sinks, EventLog(folder / "events.jsonl")) if rank == 0 else None, StopRequest())
        sinks.close()
    finally:
        session.close()
    return rows.rows


def test_every_evaluation_reaches_the_trackers_at_its_own_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = replace(text_job(tmp_path), eval=EvalConfig(every=2, steps=1), log=LogConfig(tensorboard=True))
    cfg = replace(cfg, train=replace(cfg.train, steps=4))
    _train(0, 1, cfg, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/train")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("loss/val")] == [2, 4]


def _train_unlike(rank: int, world: int, cfg: Config, folder: Path) -> list[dict[str, Any]]:
    """Rank r claims 1 + 10 r GiB and to have waited 7 - r seconds for data."""
    take, measure = Loader.__next__, memory.peak_memory_gib

    def slow(self: Loader) -> Any:
        batches = take(self)
        self.wait_s = 7.0 - rank
        return batches

    Loader.__next__ = slow  # type: ignore[method-assign]
    memory.peak_memory_gib = lambda: 1.0 + 10 * rank
    try:
        return _train(rank, world, cfg, folder)
    finally:
        Loader.__next__ = take  # type: ignore[method-assign]
        memory.peak_memory_gib = measure


@pytest.mark.distributed
def test_memory_and_data_waits_are_those_of_the_worst_rank(tmp_path: Path) -> None:
    cfg = text_job(tmp_path, dp=2)
    cfg = replace(cfg, train=replace(cfg.train, steps=2))
    rows = run_distributed(_train_unlike, 2, cfg, tmp_path / "run", group=False)[0]
    assert [(row["memory_gib"], row["data_s"]) for row in rows] == [(11.0, 7.0)] * 2


def _own_losses(rank: int, world: int, cfg: Config) -> list[float]:
    """The mean loss, and the largest one of a rank."""
    run = Run(rank, cfg, masked=True)
    try:
        result = run.stepper.run(0, *run.batches(0), run.cfg.optim.lr, watched=lambda: (0.0,))
        _, most, *_ = result.worst.wait().tolist()
        return [float(result.loss), most]
    finally:
        run.close()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}])
def test_the_largest_loss_is_that_of_one_ranks_own_tokens(layout: dict[str, Any]) -> None:
    cfg = job(dp=2, **layout)
    found = run_distributed(_own_losses, 4, cfg, group=False)
    alone = Run(0, job(global_batch=4))
    expected = []
    for rank in range(2):
        batches = microbatches(cfg, 0, rank, 2, masked=True)
        result = alone.stepper.run(0, batches, sum(batch.valid for batch in batches), 0.0)
        expected.append(float(result.loss))
    alone.close()
    assert abs(expected[0] - expected[1]) > 1e-3
    for loss, most in found:
        assert most == pytest.approx(max(expected), rel=1e-12) and min(expected) < loss < max(expected)
