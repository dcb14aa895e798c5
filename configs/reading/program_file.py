"""What the configuration must know of a pipeline program in a file: its frame, read strictly, and not believed.

The operations stay texts here; `parallel/pipeline/program.py` knows what they mean.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import Problem, UserError
from ..strict_json import JsonError, expect_int, expect_list, expect_object, expect_text, parse_json, read_bytes

KEY = "parallel.pipeline.schedule"
_KEYS = ("microbatches", "placement", "vocab_barriers", "ranks")


@dataclass(frozen=True)
class ProgramFrame:
    """A program whose operations are not read yet.

    Args:
        microbatches: per step.
        placement: the rank that holds each stage.
        vocab_barriers: 0 where embedding and head are at the ends.
        ranks: the tokens of each rank's operations.
    """

    microbatches: int
    placement: tuple[int, ...]
    vocab_barriers: int
    ranks: tuple[tuple[str, ...], ...]

    @property
    def chunks(self) -> int:
        """Stages per rank (the most of any rank)."""
        return max(self.placement.count(rank) for rank in range(len(self.ranks)))


def parse_frame(data: bytes) -> ProgramFrame:
    """The program in a JSON text.

    Raises:
        JsonError: it is none.
    """
    found = expect_object(parse_json(data), "the program")
    if "ops" in found:
        raise JsonError("this is what pentad schedule --json prints; --program FILE writes a program")
    expect_object(found, "the program", _KEYS)
    odd = [key for key in found if key not in _KEYS]
    if odd:
        raise JsonError(f"the program has no key {odd[0]!r}; its keys are {', '.join(_KEYS)}")
    lists = [expect_list(ops, "a rank") for ops in expect_list(found["ranks"], "ranks")]
    ranks = tuple(tuple(expect_text(token, "an operation") for token in ops) for ops in lists)
    placed = expect_list(found["placement"], "placement")
    placement = tuple(expect_int(rank, "a rank of placement", 0, len(ranks) - 1) for rank in placed)
    if not placement:
        raise JsonError("no stage is placed on a rank")
    microbatches = expect_int(found["microbatches"], "microbatches", 1)
    # Whoever counts from here on counts no further than the file is long.
    passes, operations = microbatches * len(placement), sum(map(len, ranks))
    if passes > operations:
        sizes = f"{microbatches} microbatches x {len(placement)} stages"
        raise JsonError(f"{sizes} are {passes} forward passes, but there are {operations} operations")
    return ProgramFrame(microbatches, placement, expect_int(found["vocab_barriers"], "vocab_barriers", 0, 2), ranks)


def read_program_bytes(file: str) -> bytes:
    """What is in the file that `parallel.pipeline.schedule` names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_bytes(Path(os.path.realpath(file)))
    except FileNotFoundError:
        raise UserError(Problem(KEY, f"no such file: {file}")) from None
    except OSError as error:
        raise UserError(Problem(KEY, f"{file} cannot be read: {error.strerror or error}")) from None
    except JsonError as error:
        raise UserError(no_program(file, error)) from None


def read_frame(file: str) -> ProgramFrame:
    """The program in the file that `parallel.pipeline.schedule` names.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return parse_frame(read_program_bytes(file))
    except JsonError as error:
        raise UserError(no_program(file, error)) from None


def no_program(file: str, why: object) -> Problem:
    """The problem with a file that is not a program."""
    return Problem(KEY, f"{file} is no program: {' '.join(str(why).split())}")
