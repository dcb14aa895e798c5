"""One recorded step of a run, and its program simulated with the step's own median times. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...configs.errors import Problem, UserError
from ...configs.strict_json import read_bytes
from ...parallel.pipeline.check import check_program
from ...parallel.pipeline.program import Program
from ...parallel.pipeline.recorded import actual, last_step
from ...parallel.pipeline.simulate import Timeline, simulate
from ...parallel.pipeline.times import Times
from ...parallel.record.reader import RecordError
from ..memory.planned import planned_bytes
from ..run_folder import RunFile


@dataclass(frozen=True)
class RealStep:
    """A step of a run.

    Args:
        step: its number, from 1.
        planned: the program, simulated with the medians of what its operations took in the step.
        actual: what really ran, in seconds.
    """

    step: int
    planned: Timeline
    actual: Timeline


def read_real_step(folder: Path, step: int | None = None) -> RealStep:
    """Reads it from a run's program and record.

    Args:
        folder: of the run.
        step: counted from 1; None: the last one of which every rank has a complete record.

    Raises:
        UserError: the record does not hold the step, or the folder no program.
    """
    program = _program(folder / RunFile.PROGRAM)
    try:
        last = last_step(program, folder)
        try:
            real = actual(program, folder, last if step is None else step - 1)  # the record counts from 0
        except UserError:
            message = f"step {step} is not whole in the record of {folder}; its last whole step is {last + 1}"
            raise UserError(Problem("--step", message)) from None
    except (OSError, RecordError) as error:
        raise UserError(Problem(str(folder), f"its record cannot be read: {error}")) from None
    spans = [
        (rank, op, *span)
        for rank, ops in enumerate(program.ranks)
        for op, span in zip(ops, real.spans[rank], strict=True)
    ]
    planned = simulate(program, Times.from_spans(spans, program.placement))
    if real.held:
        planned = replace(planned, held=planned_bytes(folder, planned))
    return RealStep((last if step is None else step - 1) + 1, planned, real)


def _program(file: Path) -> Program:
    try:
        program = Program.from_json(read_bytes(file).decode())
        check_program(program)
    except (OSError, ValueError, LookupError, UserError) as error:
        first = " ".join(str(error).split())
        raise UserError(Problem(str(file), f"is not the program of a run: {first}")) from None
    return program
