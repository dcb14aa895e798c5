"""Measured runs of plain and vocabulary-balanced 1f1b, predicted: the times by simulation, the memory by counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Program
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced

RANKS = 8
BARRIERS = {"baseline": 0, "redis": 0, "vocab-2": 1, "vocab-1": 2}
"""Of each method; `redis` is plain 1f1b whose last ranks hold fewer layers."""

RUNS = json.loads((Path(__file__).parent / "data" / "vocabulary_parallel_8gpu_runs.json").read_text())
RUNS = [run for run in RUNS if run["method"] in BARRIERS]

Run = dict[str, Any]


def name(run: Run) -> str:
    return f"{run['method']}-{run['seq_len']}-{run['vocab'] // 1000}k"


def milliseconds(microseconds: list[float], part: float = 1.0) -> tuple[float, ...]:
    return tuple(1e-3 * part * value for value in microseconds)


def predicted(run: Run) -> tuple[Program, Times]:
    barriers = BARRIERS[run["method"]]
    # GEMMs in S and T: two and one with one barrier, one and two with two.
    in_s = 2 / 3 if barriers == 1 else 1 / 3
    comm = 1e-3 * max(run["comm_us"])
    times = Times(
        forward=milliseconds(run["F_us"]),
        backward=milliseconds(run["B_us"]),
        weight=(0.0,),
        head=milliseconds(run["S_plus_T_us"], in_s),
        head_grad=milliseconds(run["S_plus_T_us"], 1 - in_s),
        embed=milliseconds(run["IF_us"]),
        embed_grad=milliseconds(run["IB_us"]),
        hop=comm,
        collective=comm,
    )
    m = run["microbatches"]
    if not barriers:
        return generate("1f1b", ranks=RANKS, microbatches=m), times
    return balanced("1f1b", ranks=RANKS, microbatches=m, barriers=barriers, times=times), times


def test_there_are_sixteen_runs() -> None:
    assert len(RUNS) == 16


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_iteration_time_within_two_percent(run: Run) -> None:
    program, times = predicted(run)
    assert simulate(program, times).makespan == pytest.approx(run["iteration_ms"], rel=0.02)


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_peak_memory_within_five_percent(run: Run) -> None:
    program, _ = predicted(run)
    assert peak_mib(program, run) == pytest.approx(run["peak_allocated_mb_max_rank"], rel=0.05)


def peak_mib(program: Program, run: Run) -> float:
    """Of the fullest rank.

    16 bytes per parameter (mixed-precision Adam), 34 bytes per token, hidden unit and layer in flight, and the logits
    of one microbatch: bf16, fp32 and their gradient on the last rank, or the bf16 and fp32 shard of every rank.
    """
    h, v, tokens = run["hidden"], run["vocab"], run["seq_len"]
    every = BARRIERS[run["method"]] > 0
    peaks = []
    for rank, layers in enumerate(layers_of(run)):
        parameters = layers * (12 * h * h + 13 * h) + (tokens * h if rank == 0 else 0)
        if every:
            parameters += 2 * v * h // RANKS
            logits = (2 + 4) * tokens * v // RANKS
        else:
            parameters += v * h * (rank in (0, RANKS - 1))
            logits = (2 + 4 + 4) * tokens * v * (rank == RANKS - 1)
        peaks.append(16 * parameters + 34 * tokens * h * layers * in_flight(program, rank) + logits)
    return max(peaks) / 2**20


def layers_of(run: Run) -> list[int]:
    """Of each rank, by its forward time; what is left is the last one's, which may have the head."""
    if run["method"] != "redis":
        return [run["layers"] // RANKS] * RANKS
    fewest = min(run["F_us"][:-1])
    layers = [round(4 * time / fewest) for time in run["F_us"][:-1]]
    return [*layers, run["layers"] - sum(layers)]


def in_flight(program: Program, rank: int) -> int:
    """Microbatches between F and BW on a rank, at most."""
    held = peak = 0
    for op in program.ranks[rank]:
        held += {Kinds.FORWARD: 1, Kinds.BACKWARD: -1}.get(op.kind, 0)
        peak = max(peak, held)
    return peak
