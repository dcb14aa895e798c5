"""Where the time went, on real ranks: all of the step is explained, and what makes ranks wait is found in its place."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pentad.configs.schema import MoeConfig
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.record.parts import AT, CPU, SECONDS, STEP, TIME_PARTS, TimePart
from pentad.trainer.metrics.readings.waterfall import PLANNED, UNPLANNED, WaterfallReading
from tests.distributed import run_distributed
from tests.rows import watched
from tests.trainer.metrics.reports import DONE
from tests.training import job

MOE = MoeConfig(experts=8, top_k=2, ffn=32)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 pp2 dp2": {"tp": 2, "pp": 2, "dp": 2, "sharding": "zero1"},
    "ep4 cp2": {"ep": 4, "cp": 2, "dp": 4, "model": {"moe": MOE}},
    "pp4 dp2": {"pp": 4, "dp": 2, "model": {"layers": 4}},
    "dp8 fsdp": {"dp": 8, "sharding": "fsdp2"},
    "pp2 balanced": {"pp": 2, "tp": 2, "cp": 2, "pipeline": {"vocab": "balanced"}, "recompute": "full"},
}


def _rows(rank: int, world: int, layout: dict[str, Any], name: str, steps: int) -> tuple[list[float], np.ndarray]:
    """The steps' lengths on this rank, and on rank 0 (steps, ranks, numbers)."""
    with watched(rank, job(**{"seq_len": 32, "global_batch": 16, **layout}), name) as made:
        for _ in range(steps):
            made.step()
        return made.lengths, np.stack([found.rows for found in made.found]) if rank == 0 else np.empty(0)


@pytest.mark.parametrize(
    "layout", [name if name == "tp2 pp2 dp2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_all_of_every_ranks_step_is_explained(layout: str) -> None:
    steps = 12
    found = run_distributed(_rows, 8, LAYOUTS[layout], uuid.uuid4().hex, steps, group=False, timeout_s=300)
    rows = found[0][1]
    assert rows.shape[:2] == (steps - 1, 8)
    assert rows[:, :, STEP].tolist() == [[float(step)] * 8 for step in range(1, steps)]
    lengths = np.array([lengths for lengths, _ in found]).T[:-1]
    parts = rows[:, :, : len(TIME_PARTS)]
    # The rest is got by subtraction, so the sum alone would prove nothing: the rest has to be small.
    assert np.abs(parts.sum(2) / lengths - 1).max() < 0.005
    others = parts[..., AT[TimePart.OTHER]] / lengths
    assert others.min() > -0.005 and np.median(others) < 0.03
    typical = dict(zip(TIME_PARTS, np.median(parts, (0, 1)), strict=True))
    degrees = LAYOUTS[layout]
    assert typical[TimePart.COMPUTE] > 0
    assert (typical[TimePart.BUBBLE] > 0) == (degrees.get("pp", 1) > 1)
    for part, degree in ((TimePart.TP, "tp"), (TimePart.EP, "ep")):
        assert (typical[part] > 0) == (degrees.get(degree, 1) > 1)
    assert (typical[TimePart.RECOMPUTE] > 0) == ("recompute" in degrees)


def _late_to_reduce(rank: int, world: int, name: str, sleep_s: float) -> np.ndarray:
    """Rank 1 sleeps before its reduction."""
    with watched(rank, job(dp=world, model={"hidden": 64, "ffn": 128}), name) as made:
        if rank == 1:
            replicas = made.run.parts.replicas
            reduce = replicas.reduce

            def late(bucket: int) -> None:
                if bucket == 0:
                    time.sleep(sleep_s)
                reduce(bucket)

            replicas.reduce = late  # type: ignore[method-assign]
        for _ in range(10):
            made.step()
        return np.stack([found.rows for found in made.found]) if rank == 0 else np.empty(0)


@pytest.mark.parametrize("sleep_s", [0.1, pytest.param(0.02, marks=pytest.mark.slow)])
def test_a_rank_that_comes_late_is_waited_for_and_does_not_compute(sleep_s: float) -> None:
    rows = run_distributed(_late_to_reduce, 4, uuid.uuid4().hex, sleep_s, group=False)[0][2:]
    waited = np.median(rows[..., AT[TimePart.STRAGGLER]], 0)
    assert (np.delete(waited, 1) > 0.6 * sleep_s).all() and waited[1] < waited.min(where=np.arange(4) != 1, initial=9)
    late = rows[:, 1]
    assert (late[:, AT[TimePart.CONTENTION]] > 0.9 * sleep_s).all()  # its own time, in which it did not run
    assert (late[:, AT[TimePart.COMPUTE]] <= late[:, CPU] * 1.01).all()
    moving = np.median(rows[..., AT[TimePart.DP]], 0)
    assert moving[1] < np.delete(moving, 1).max() + 0.5 * sleep_s
    assert (late[:, SECONDS] > sleep_s).all()


_FORWARD, _BACKWARD = (0.06, 0.1, 0.04, 0.08), (0.12, 0.16, 0.1, 0.18)


def _waiting_stages(rank: int, world: int, name: str) -> tuple[list[dict[str, Any]], list[float]]:
    """What rank 0 reports where the stages do nothing but wait; and the planned idle time of each rank."""
    cfg = job(pp=world, model={"layers": world}, global_batch=4, micro_batch=1, seq_len=8)
    with watched(rank, cfg, name) as made:
        stepper, handlers = made.run.stepper, made.run.stepper._handlers
        for kind, times in ((Kinds.FORWARD, _FORWARD), (Kinds.BACKWARD, _BACKWARD)):
            stepper._handlers = handlers = handlers | {kind: _waiting(handlers[kind], times[rank])}
        for _ in range(3):
            made.step()
        if rank:
            return [], []
        program = made.run.session.program
        halves = tuple(each / 2 for each in _BACKWARD)
        line = simulate(program, Times(forward=_FORWARD, backward=halves, weight=halves))
        busy = [cfg.train.global_batch * (f + b) for f, b in zip(_FORWARD, _BACKWARD, strict=True)]
        reading = WaterfallReading(made.facts())
        reported = [reading.step(replace(DONE, step=rows.step + 1, rows=(rows,))) for rows in made.found]
        return [dict(r["waterfall"]) for r in reported], [line.makespan - each for each in busy] + [line.makespan]


def _waiting(handler: Any, seconds: float) -> Any:
    def run(op: Any) -> None:
        handler(op)
        time.sleep(seconds)

    return run


def test_the_planned_bubble_is_the_simulators() -> None:
    reports, idle = run_distributed(_waiting_stages, 4, uuid.uuid4().hex, group=False)[0]
    makespan = idle.pop()
    expected = sum(idle) / len(idle) / makespan
    report = reports[-1]
    assert report[PLANNED] == pytest.approx(expected, rel=0.05)
    assert report[UNPLANNED] < 0.1 * expected
