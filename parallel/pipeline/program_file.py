"""Programs from files, for training: read strictly, checked, and refused in one line that says why."""

from __future__ import annotations

from dataclasses import replace

from ...configs.errors import Problem, UserError
from ...configs.reading.program_file import KEY, no_program, read_program_bytes
from .check import ProgramError, check_program
from .communication import is_training, number_slots
from .program import Program


def read_program(file: str, *, whole: bool = False) -> Program:
    """The program of a training step in a file: of compute alone, or with its communication.

    Args:
        file: its path.
        whole: keep the update at the end of each rank's list and copies to the host. Training makes its own, for its
            own buckets and its own memory.

    Raises:
        UserError: the file is no program, or one that cannot run.
    """
    try:
        program = Program.from_json(read_program_bytes(file).decode())
    except ValueError as error:
        raise UserError(no_program(file, error)) from None
    try:
        check_program(program)
    except ProgramError as error:
        first, *others = error.problems
        more = f" (and {len(others)} more like it)" if others else ""
        raise UserError(Problem(KEY, f"{file} cannot run: {first}{more}")) from None
    if not is_training(program):
        raise UserError(no_program(file, "it has no backward passes"))
    if whole:
        return program
    ranks = [tuple(op for op in ops if op.kind.computes or op.kind.communicates) for ops in program.ranks]
    # A receive's slot may have been in use for longer or shorter beside copies.
    return replace(program, ranks=tuple(number_slots(ops, training=True) for ops in ranks))
