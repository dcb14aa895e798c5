"""The delay matrix: a slow link is told from a rank whose ways are all slow, and from links that carry more."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from pentad.parallel.comm.collectives import all_gather, all_reduce
from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.comm.processes import Process
from pentad.parallel.record.links import Link, blamed_link, delay_matrix, slow_links
from pentad.parallel.record.parts import AT, DURATIONS, LINK_RANK, LINK_S, OWN, SECONDS, TimePart
from pentad.parallel.record.ring import Recorder
from pentad.parallel.record.stragglers import Reason, Stragglers, StragglerVerdict
from pentad.parallel.record.waterfall import StepReader, StepTimes
from tests.distributed import job_store, run_distributed

STEP_S, LATE_S = 0.1, 0.04


def _rows(slowest: dict[int, tuple[int, float]], ranks: int = 8) -> np.ndarray:
    """(ranks, numbers) of a step: of some ranks which one they copied from longest, and for how long."""
    rows = np.zeros((ranks, DURATIONS))
    rows[:, LINK_RANK], rows[:, OWN], rows[:, SECONDS] = -1, STEP_S, STEP_S + LATE_S
    for rank, (owner, seconds) in slowest.items():
        rows[rank, LINK_RANK], rows[rank, LINK_S], rows[rank, AT[TimePart.TP]] = owner, seconds, seconds
    return rows


def test_cells_are_the_links_that_are_a_ranks_slowest_in_most_steps() -> None:
    draws = np.random.default_rng(3)
    window = []
    for step in range(20):
        chance = {5: (int(draws.integers(5)), 0.001)}
        window.append(_rows({2: (3, 0.01 + 0.001 * step), **chance, 6: (7 if step % 3 else 4, 0.002)}))
    assert delay_matrix(np.stack(window)) == {(2, 3): pytest.approx(0.0195), (6, 7): pytest.approx(0.002)}


def test_a_cell_counts_where_it_exceeds_those_of_its_role() -> None:
    matrix = {(0, 1): 0.029, (1, 0): 0.02, (2, 3): 0.02, (3, 2): 0.021, (4, 5): 0.02, (6, 7): 0.001}
    roles = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    assert slow_links(matrix, roles, STEP_S) == [(4, 5)], "the others of 0 are as slow, and 0.001 s is nothing"
    assert slow_links(matrix | {(0, 1): 0.04}, roles, STEP_S) == [(0, 1), (4, 5)]


@pytest.mark.parametrize(
    ("slow", "rank", "blamed"),
    [
        ([(0, 1)], 0, (0, 1)),
        ([(0, 1)], 1, (1, 0)),
        ([(0, 1), (1, 0), (5, 6)], 1, (1, 0)),
        ([(0, 1), (2, 1)], 1, (1, None)),
        ([(1, 0), (1, 2)], 0, (1, None)),
        ([(0, 1)], 5, None),
    ],
)
def test_one_link_is_a_link_and_several_are_their_rank(
    slow: list[Link], rank: int, blamed: tuple[int, int | None] | None
) -> None:
    assert blamed_link(rank, slow) == blamed


def _verdicts(slowest: dict[int, tuple[int, float]], windows: int = 4) -> list[StragglerVerdict]:
    stragglers, draws = Stragglers([0] * 4 + [1] * 4), np.random.default_rng(7)
    found = []
    for step in range(20 * windows):
        rows = _rows(slowest)
        rows[:, OWN] *= 1 + 0.02 * draws.standard_normal(8)
        verdict = stragglers.step(step + 1, rows, np.ones(8))
        found += [] if verdict is None else [verdict]
    return found


def test_both_ends_of_a_slow_link_are_named_in_every_window_alike() -> None:
    found = _verdicts({6: (7, LATE_S), 7: (6, 1.02 * LATE_S)})
    assert [(each.rank, each.peer, each.reason) for each in found] == [(6, 7, Reason.NETWORK)] * 4
    assert [each.confirmed for each in found] == [False, False, True, True]
    assert found[-1].cost == pytest.approx(LATE_S / (STEP_S + LATE_S), abs=0.03)


def test_a_rank_all_of_whose_links_are_slow_is_named_alone() -> None:
    found = _verdicts({4: (5, LATE_S), 5: (4, 0.9 * LATE_S), 0: (4, 0.9 * LATE_S)})
    assert {(each.rank, each.peer, each.reason) for each in found} == {(4, None, Reason.NETWORK)}


def test_a_rank_that_is_slow_itself_is_no_links_fault() -> None:
    stragglers, draws, found = Stragglers([0] * 4 + [1] * 4), np.random.default_rng(7), []
    for step in range(80):
        rows = _rows({})
        rows[:, OWN] *= 1 + 0.02 * draws.standard_normal(8)
        rows[3, OWN] *= 1.3
        found.append(stragglers.step(step + 1, rows, np.ones(8)))
    assert {(each.rank, each.peer, each.reason) for each in found if each} == {(3, None, Reason.COMPUTE)}


_DELAY_S = 0.03


def _delayed(rank: int, world: int) -> list[np.ndarray]:
    """The rows of some steps in which what ranks 2 and 3 copy from each other takes long."""
    read = Process.read

    def slow(self: Process, *args: Any) -> None:
        if {rank, self.rank} == {2, 3}:
            time.sleep(_DELAY_S)
        read(self, *args)

    Process.read = slow  # type: ignore[method-assign]
    recorder = Recorder(None, rank=rank, world=world, entries=1024)
    mesh = Mesh(Degrees(dp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder)
    try:
        axis, reader, rows = mesh.axis("dp"), StepReader(recorder, (), pipelined=False), []
        for step in range(8):
            begin = time.monotonic_ns()
            for x in (torch.ones(8), torch.ones(1 << 15)):
                all_reduce(x, axis).wait()
                all_gather(x, axis).wait()
            found = reader.read([StepTimes(step + 1, begin, time.monotonic_ns())])
            assert found is not None
            rows.append(found[0])
        return rows
    finally:
        Process.read = read  # type: ignore[method-assign]
        mesh.close()


@pytest.mark.distributed
def test_the_copies_of_real_ranks_fill_the_matrix() -> None:
    rows = np.stack(run_distributed(_delayed, 4, group=False), axis=1)
    step_s = float(np.median(rows[..., SECONDS]))
    matrix = delay_matrix(rows)
    assert set(slow_links(matrix, np.zeros(4, int), step_s)) == {(2, 3), (3, 2)}
    # The large sum has two steps; and whoever comes last has copied before it begins to wait.
    assert min(matrix[2, 3], matrix[3, 2]) >= 5 * _DELAY_S
    assert (np.median(rows[:, 2:, AT[TimePart.DP]], 0) >= 2 * _DELAY_S).all()
