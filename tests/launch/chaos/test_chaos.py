"""Faults in real jobs: the right rank and class, said first; everybody else leaves at once; nothing stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.chaos.harness import Outcome, draw, right, run_job
from tests.launch.chaos.inject import KINDS, PAUSE, SLOW, Fault

_QUICK = ["faults.alive_s=1.5", "faults.hang_s=2", "faults.pause_s=4"]


def _expect(fault: Fault, outcome: Outcome) -> None:
    assert right(fault, outcome), (fault, outcome)
    if fault.kind in SLOW:
        assert not outcome.left
        return
    assert outcome.verdict is not None and outcome.first == f"error: {outcome.verdict.line}"
    assert not outcome.left
    assert all(outcome.codes), "every rank says that the job has failed"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["kill", "gil", "skip", "slow data"])
def test_a_fault_is_named_and_ends_the_job(tmp_path: Path, kind: str) -> None:
    fault = Fault(kind, rank=2, step=1, call=3, mark="")
    _expect(fault, run_job(tmp_path, "tp2 dp2", fault, *_QUICK))
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    (verdict,) = [event for event in events if event["event"] == "verdict"]
    assert verdict["kind"] == KINDS[kind] and "step" not in verdict, "a step that was not done is none of the run's"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seed", range(60))
def test_any_fault_anywhere_is_named_and_ends_the_job(tmp_path: Path, seed: int) -> None:
    layout, fault = draw(seed)
    _expect(fault, run_job(tmp_path, layout, fault))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_save_of_two_seconds_and_an_evaluation_are_no_faults(tmp_path: Path) -> None:
    more = [*_QUICK, "train.steps=5", "checkpoint.every=3", "checkpoint.asynchronous=false", "eval.every=2"]
    outcome = run_job(tmp_path, "tp2 dp2", Fault(PAUSE, 1, 0, 0, ""), *more)
    assert (outcome.verdict, outcome.codes, outcome.left) == (None, (0, 0, 0, 0), ())
    assert "verdict" not in (tmp_path / "a" / "events.jsonl").read_text()
    saved = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert max(event.get("seconds", 0.0) for event in saved) > 2


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "rank"), [("hang", 3), ("kill", 2), ("skip", 1)])
def test_the_watchers_of_two_nodes_find_a_cause_together(tmp_path: Path, kind: str, rank: int) -> None:
    fault = Fault(kind, rank, step=1, call=3, mark="")
    _expect(fault, run_job(tmp_path, "tp2 dp2", fault, *_QUICK, nodes=2))
