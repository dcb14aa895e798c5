"""Why a rank ended: what is told to the other ranks and to the launcher, and who prints what."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...configs import UserError
from ...configs.strict_json import (
    JsonError,
    expect_int,
    expect_list,
    expect_object,
    expect_text,
    parse_json,
    read_bytes,
)
from .meeting import LostRank, Meeting

_LOSSES = {"LostRank", "PeerGone", "Aborted", "Overdue", "Mismatch", "DistNetworkError"}
"""Exceptions, by name (torch may not be imported yet), that only say that another rank is gone, late or astray."""
_BROKEN = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Connection refused|Socket closed")
"""What gloo and TCP say of it, in whatever exception."""


@dataclass(frozen=True)
class Failure:
    """Why a rank ended."""

    rank: int
    world: int
    at: float
    """Seconds since the epoch."""
    user: bool
    """A mistake of the user's: no traceback, exit code 2."""
    everywhere: bool
    """Every rank fails alike, because it happened while the configuration was read."""
    lost: bool
    """Only because another rank is gone, which is the cause."""
    lines: tuple[str, ...]
    """The problems, or the one line of the exception."""
    trace: str
    told: bool = False
    """The watcher has told the job to end, and says why."""

    @property
    def exit_code(self) -> int:
        """2 for the user's mistakes, 1 for everything else."""
        return 2 if self.user else 1

    def text(self) -> str:
        """What to print of the first failure of a job."""
        if self.lost:
            return f"error: rank {self.rank} of {self.world} stopped, another rank is gone: {self.lines[0]}"
        if self.user:
            return "\n".join(f"error: {line}" for line in self.lines)
        who = f"rank {self.rank} of {self.world}" if self.world > 1 else "the run"
        return f"{self.trace.rstrip()}\nerror: {who} failed: {self.lines[0]}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def parse(data: bytes) -> Failure | None:
        """What `as_dict` made, written as JSON; None for anything else."""
        try:
            known = expect_object(parse_json(data), "a failure", Failure.__dataclass_fields__)
            lines = tuple(expect_text(line, "a line") for line in expect_list(known["lines"], "lines"))
            rank, world = (expect_int(known[key], key) for key in ("rank", "world"))
            at, flags = known["at"], (known[key] is True for key in ("user", "everywhere", "lost"))
            trace = expect_text(known["trace"], "trace")
        except JsonError:
            return None
        if not lines or not isinstance(at, float):
            return None
        user, everywhere, lost = flags
        return Failure(rank, world, at, user, everywhere, lost, lines, trace, known["told"] is True)


def failure_of(error: BaseException, *, rank: int, world: int, everywhere: bool = False) -> Failure:
    """The failure of a rank."""
    user = isinstance(error, UserError) or (isinstance(error, LostRank) and error.user)
    first = str(error).partition("\n")[0]
    lines = [str(p) for p in error.problems] if isinstance(error, UserError) else [f"{type(error).__name__}: {first}"]
    return Failure(
        rank=rank,
        world=world,
        at=time.time(),
        user=user,
        everywhere=everywhere,
        lost=world > 1 and is_loss(error),
        lines=tuple(" ".join(line.split()) for line in lines),
        trace="" if user else "".join(traceback.format_exception(error)),
    )


def is_loss(error: BaseException) -> bool:
    """Whether a rank ends with this error only because it has lost another one."""
    return any(_is_loss(each) for each in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _is_loss(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & _LOSSES) or (not isinstance(error, UserError) and bool(_BROKEN.search(str(error))))


def failure_file(run_dir: Path, rank: int) -> Path:
    """Where a rank of a run writes down why it ended."""
    return run_dir / "record" / f"rank-{rank:05d}.failure.json"


def write_failure(run_dir: Path, failure: Failure) -> None:
    """Writes a failure down, traceback and all, for whoever looks at the run; a full disk hides none."""
    file = failure_file(run_dir, failure.rank)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(failure.as_dict()))
        partial.rename(file)


def drop_unfinished_failure(run_dir: Path, pid: int) -> None:
    """Removes what a process that was killed meanwhile had begun to write down."""
    for partial in failure_file(run_dir, 0).parent.glob(f"rank-*.failure.{pid}.partial"):
        partial.unlink(missing_ok=True)


def read_failure(run_dir: Path, rank: int) -> Failure | None:
    """What a rank has written down."""
    with contextlib.suppress(OSError, JsonError):
        return Failure.parse(read_bytes(failure_file(run_dir, rank)))
    return None


def print_failure(failure: Failure, meeting: Meeting) -> None:
    """Prints the first failure of the job whole; what other ranks met after it in one line, user's mistakes not again.

    Under somebody else's launcher the ranks share nothing but its store, which decides who was first. Silence of all
    but rank 0 would not do: torchrun ends the other ranks as soon as one has left.
    """
    if failure.told and failure.lost:
        return
    first = meeting.tell(failure.lines[0], user=failure.user)
    if first is None:
        # Nobody can be asked. A mistake while reading the config is made by all; a rank that lost others is no cause.
        first = failure.rank == 0 if failure.everywhere else not failure.lost
    if first:
        print(failure.text(), file=sys.stderr, flush=True)
    elif not failure.user:
        print(f"rank {failure.rank} then stopped: {failure.lines[0]}", file=sys.stderr, flush=True)
