"""A schedule that a module outside the package adds is one like all others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pentad.configs import Config, UserError, document, load, render
from pentad.configs.tables.schedules import SCHEDULES
from pentad.launch.cli import main
from pentad.parallel.pipeline.check import check_program
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.program import Op, Ops
from pentad.parallel.pipeline.schedules import Orders, Schedule, Shape, generate, register
from pentad.parallel.pipeline.schedules.base import backward, forward
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from tests import same_training

TINY = ["model.layers=4", "model.hidden=64", "model.heads=4", "model.ffn=128", "parallel.pp=2"]
NAME = "newest-first"
ROW = Schedule(name=NAME, text="all forward passes, then the backward passes of the newest first", chunks=None)


def newest_first(shape: Shape) -> Orders:
    return tuple(_of_rank(shape, rank) for rank in range(shape.ranks))


def _of_rank(shape: Shape, rank: int) -> Ops:
    done = [(i, c * shape.ranks + rank) for c in range(shape.chunks) for i in range(shape.microbatches)]
    ops: list[Op] = [forward(i, stage) for i, stage in done]
    return (*ops, *(backward(i, stage) for i, stage in reversed(done)))


@pytest.fixture
def registered() -> Iterator[None]:
    register(ROW)(newest_first)
    yield
    del SCHEDULES[NAME]


def train(rank: int, world: int, cfg: Config, masked: bool) -> same_training.Trained:
    """A rank that has imported the module with the schedule."""
    if NAME not in SCHEDULES:
        register(ROW)(newest_first)
    return same_training.train(rank, world, cfg, masked)


@pytest.mark.usefixtures("registered")
def test_it_is_checked_simulated_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    for ranks, microbatches, chunks in ((1, 1, 1), (2, 3, 1), (3, 5, 2), (4, 2, 3)):
        program = lower(generate(NAME, ranks=ranks, microbatches=microbatches, chunks=chunks))
        check_program(program)
        assert simulate(program, Times()).makespan >= 3 * microbatches * chunks
    assert main(["schedule", NAME, "--ranks", "2", "--microbatches", "3", "--width", "80"]) == 0
    out = capsys.readouterr().out
    assert ROW.text in out and len([line for line in out.splitlines() if line.startswith("rank ")]) == 2


@pytest.mark.usefixtures("registered")
def test_the_configuration_knows_it() -> None:
    keys = [*TINY, f"parallel.pipeline.schedule={NAME}"]
    assert load(None, keys).parallel.pipeline.chunks == 2
    assert ROW.text in render(document("parallel.pipeline.schedule"))
    with pytest.raises(UserError, match=f"did you mean {NAME}"):
        load(None, [*TINY, "parallel.pipeline.schedule=newest_first"])
    with pytest.raises(UserError, match="only gis and interleaved have groups"):
        load(None, [*keys, "parallel.pipeline.group=2"])


@pytest.mark.distributed
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("chunks", [1, 2])
def test_it_trains_like_one_process(chunks: int) -> None:
    pipeline: dict[str, Any] = {"schedule": NAME, "chunks": chunks}
    same_training.check(pp=2, dp=2, model={"layers": 4}, pipeline=pipeline, steps=3, trains=train)


@pytest.mark.usefixtures("registered")
def test_a_name_is_taken_once() -> None:
    for row in (ROW, Schedule(name="gis", text="another one")):
        with pytest.raises(ValueError, match=row.name):
            register(row)(newest_first)
    assert SCHEDULES["gis"].text != "another one"


def test_the_table_needs_neither_torch_nor_the_orders() -> None:
    code = (
        "import sys, pentad.configs.tables.schedules; sys.exit(bool({'torch', 'pentad.parallel'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
