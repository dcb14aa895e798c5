"""Stragglers of real ranks; the scores themselves are tested in tests/parallel/record."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pentad.configs.schema import MoeConfig
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.record import kinds
from pentad.parallel.record.files import RingFile
from pentad.parallel.record.parts import AT, AXES, BLIND, DURATIONS, LINK_RANK, LINK_S, OWN, PAIRS, SECONDS, TimePart
from pentad.parallel.record.ring import HEADER_BYTES, Recorder
from pentad.trainer.metrics.readings.roles import grid, lines
from pentad.trainer.metrics.readings.straggler import StragglerReading, roles
from pentad.trainer.metrics.readings.waterfall import split_blind
from pentad.trainer.metrics.rows import RowExchange, StepRows
from pentad.trainer.pipeline.programs import evaluation_program
from tests.distributed import run_distributed
from tests.rows import Watched, watched
from tests.trainer.metrics.reports import DONE, facts
from tests.training import job

_STAGES_S = (0.002, 0.005)


def _pausing(made: Watched, seconds: float) -> None:
    """Every operation of the rank takes longer by so much."""
    handlers = made.run.stepper._handlers
    for kind in (Kinds.FORWARD, Kinds.BACKWARD):
        given = handlers[kind]

        def run(op: Any, given: Any = given) -> None:
            given(op)
            time.sleep(seconds)

        handlers[kind] = run


def _clean(rank: int, world: int, name: str, steps: int, scale: float, slow: float) -> list[dict[str, Any]]:
    """What rank 0 reports of a job with uneven stages and experts, a save of 2 s and an evaluation."""
    model = {"layers": 2, "moe": MoeConfig(experts=4, top_k=1, ffn=32)}
    cfg = job(pp=2, dp=2, ep=2, model=model, global_batch=8, dtype="fp32")
    with watched(rank, cfg, name) as made:
        mesh, reading = made.run.mesh, StragglerReading(made.facts())
        _pausing(made, scale * _STAGES_S[mesh.axis("pp").rank] * (slow if rank == 1 else 1.0))
        program = evaluation_program(cfg, made.run.parts.pipeline, 2)
        found, seen = [], 0
        for step in range(steps):
            made.step()
            if step == steps // 2:
                with mesh.recorder.span(mesh.recorder.intern(kinds.SAVE)):
                    time.sleep(2.0 if rank == 0 else 0.0)
            if step == steps // 3:
                made.run.stepper.evaluate(made.run.batches(0)[0][:2], program)
            for rows in made.found[seen:]:
                found.append(dict(reading.step(replace(DONE, step=rows.step + 1, rows=(rows,), worst=(0.0,)))))
            seen = len(made.found)
        return found


@pytest.mark.slow
def test_a_thousand_clean_steps_raise_at_most_one_flag() -> None:
    found = run_distributed(_clean, 4, uuid.uuid4().hex, 1000, 1.0, 1.0, group=False, timeout_s=1500)[0]
    windows = [values["straggler"] for values in found if values["straggler"] and "slower" in values["straggler"]]
    assert len(windows) == 49
    assert sum(values.get("straggler_alert") is not None for values in found) <= 1


@pytest.mark.slow
def test_a_slow_rank_of_an_uneven_job_is_found() -> None:
    found = run_distributed(_clean, 4, uuid.uuid4().hex, 85, 15.0, 2.0, group=False, timeout_s=600)[0]
    (alert,) = [values["straggler_alert"] for values in found if values.get("straggler_alert")]
    assert alert.fields["rank"] == 1 and alert.fields["reason"] == "compute"


def test_an_alert_of_a_slow_link_names_both_ends_once() -> None:
    reading, found = StragglerReading(facts(job(dp=4))), []
    draws = np.random.default_rng(5)
    for step in range(1, 101):
        rows = np.zeros((4, DURATIONS))
        rows[:, OWN] = 0.1 + 0.002 * draws.standard_normal(4)
        rows[:, SECONDS], rows[:, LINK_RANK] = 0.16, -1
        for rank, peer in ((1, 3), (3, 1)):
            rows[rank, [LINK_RANK, LINK_S, AT[TimePart.DP]]] = peer, 0.04, 0.04
        values = reading.step(replace(DONE, step=step + 1, rows=(StepRows(step, rows),), worst=(0.0,)))
        found += [values["straggler_alert"]] if values.get("straggler_alert") else []
    (alert,) = found
    assert (alert.fields["rank"], alert.fields["peer"], alert.fields["reason"]) == (1, 3, "network")
    assert "(its link with rank 3)" in alert.text and alert.fields["cost"] == pytest.approx(0.25, abs=0.02)


def test_ranks_of_a_stage_and_a_place_on_cp_are_compared() -> None:
    cfg = job(tp=2, pp=2, cp=2, dp=2)
    assert roles(replace(facts(cfg), devices=16)).tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    alone = job(pp=2, cp=2)
    assert roles(facts(alone)).tolist() == [0, 0, 1, 1]


def test_lines_are_the_ranks_that_communicate() -> None:
    cfg = job(tp=2, pp=2, cp=2, dp=2, ep=4, model={"moe": MoeConfig(experts=4, top_k=1)})
    assert grid(cfg).shape == (2, 2, 2, 2)
    assert lines(cfg, TimePart.TP).tolist()[:2] == [[0, 1], [2, 3]]
    assert lines(cfg, TimePart.CP).tolist()[:2] == [[0, 2], [1, 3]]
    assert lines(cfg, TimePart.DP).tolist()[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert lines(cfg, TimePart.PP).tolist()[:2] == [[0, 8], [1, 9]]
    assert lines(cfg, TimePart.EP).tolist()[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert lines(cfg, TimePart.VOCABULARY).tolist()[0] == [0, 1, 8, 9]


def test_who_waits_least_tells_what_was_communication() -> None:
    cfg = job(tp=2, dp=2)
    rows = np.zeros((4, BLIND + len(AXES)))
    rows[:, BLIND + AXES.index(TimePart.TP)] = [3.0, 1.0, 2.0, 5.0]
    rows[:, AT[TimePart.TP]] = 0.5
    split = split_blind(rows, facts(cfg))
    assert split[:, AT[TimePart.TP]].tolist() == [1.5, 1.5, 2.5, 2.5]
    assert split[:, AT[TimePart.STRAGGLER]].tolist() == [2.0, 0.0, 0.0, 3.0]
    assert rows[0, AT[TimePart.TP]] == 0.5


class _Store:
    """A job's store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def test_rows_of_other_nodes_come_through_the_store() -> None:
    rings = [RingFile(rank, f"node{rank // 2}", "", 0) for rank in range(4)]
    store, recorders = _Store(), [Recorder(None, rank=rank, world=4, entries=8) for rank in range(4)]
    ends = [
        RowExchange(recorder, rank, 4, (), pipelined=False, rings=rings, store=store)
        for rank, recorder in enumerate(recorders)
    ]
    # A neighbour's memory, as if it had been mapped: these hosts do not exist.
    for first in (0, 2):
        ends[first]._headers[first + 1] = recorders[first + 1].memory[:HEADER_BYTES]
    found = []
    for step in range(1, 6):
        for rank, end in enumerate(ends):
            if (step, rank) != (3, 3):  # which has no row of this step
                end.step(step, 0, 1000 * step + rank, 0.0)
        found.append(ends[0].collect(step))
    assert [[rows.step for rows in given] for given in found] == [[], [1], [2], [], [4]]
    (last,) = found[-1]
    assert last.rows.shape[0] == 4
    assert [round(1e9 * each) for each in last.rows[:, AT[TimePart.OTHER]]] == [4000, 4001, 4002, 4003]


def test_short_steps_are_divided_at_once_and_each_is_known_once() -> None:
    rings = [RingFile(rank, f"node{rank // 2}", "", 0) for rank in range(4)]
    store, recorders = _Store(), [Recorder(None, rank=rank, world=4, entries=8) for rank in range(4)]
    ends = [
        RowExchange(recorder, rank, 4, (), pipelined=False, rings=rings, store=store)
        for rank, recorder in enumerate(recorders)
    ]
    for first in (0, 2):
        ends[first]._headers[first + 1] = recorders[first + 1].memory[:HEADER_BYTES]
    given, clocks = {}, [0] * 4
    for step in range(1, 80):
        for rank in (1, 2, 3, 0):
            # One rank's clock says of some steps that it is time.
            length = 200_000_000 if rank == 3 and step % 5 == 0 else 1000
            begin = clocks[rank]
            clocks[rank] += length
            ends[rank].step(step, begin, clocks[rank], 0.0, due=step in (30, 58, 78))
        given[step] = [rows.step for rows in ends[0].collect(step)]
    found = [step for steps in given.values() for step in steps]
    assert sorted(found) == list(range(1, 79))
    assert given[31][-1] == 30 and given[79][-1] == 78
    assert sum(map(bool, given.values())) <= 16


def test_short_steps_of_one_rank_are_divided_as_one_unless_there_was_something_in_between() -> None:
    recorder = Recorder(None, rank=0, world=1, entries=64)
    rows, found = RowExchange(recorder, 0, 1, (), pipelined=False), []
    for step in range(1, 32):
        gap = 500 if step > 20 else 0  # an evaluation
        rows.step(step, 1000 * step + gap, 1000 * step + 1000 + gap, 2.0, due=step == 30)
        found += [(each.step, each.steps, each.rows[0, SECONDS], each.rows[0, PAIRS]) for each in rows.collect(step)]
    lengths = {7: 7, 15: 8, 20: 5, 23: 3, 30: 7, 31: 1}
    assert found == [(step, n, pytest.approx(1e-6 * n), 2.0 * n) for step, n in lengths.items()]
