"""One rank of a job: ``torchrun … -m pentad.trainer CONFIG [key=value …]``, or any launcher that sets RANK etc."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from ..configs import Config, UserError, given_yaml, hide, load
from .preflight import preflight

USAGE = "usage: torchrun … -m pentad.trainer CONFIG [key=value …]"


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
    lines: tuple[str, ...]
    """The problems, or the one line of the exception."""
    trace: str

    @property
    def exit_code(self) -> int:
        """2 for the user's mistakes, 1 for everything else."""
        return 2 if self.user else 1

    def text(self) -> str:
        """What to print: a line per problem, or the traceback and a line with the rank."""
        if self.user:
            return "\n".join(f"error: {line}" for line in self.lines)
        who = f"rank {self.rank} of {self.world}" if self.world > 1 else "the run"
        return f"{self.trace.rstrip()}\nerror: {who} failed: {self.lines[0]}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def main(argv: Sequence[str] | None = None, failed: Callable[[Failure], None] | None = None) -> int:
    """Runs this rank of the job.

    Args:
        argv: CONFIG and overrides; none: the command line's.
        failed: told about the failure instead of it being printed.

    Returns:
        The exit code: 0, 2 for a user's mistake, 1 for any other error, 130 for Ctrl-C before the first step.
    """
    argv = sys.argv[1:] if argv is None else argv
    failed = failed or print_failure
    if not argv or argv[0].startswith("-"):
        print(f"error: no CONFIG; {USAGE}", file=sys.stderr)
        return 2
    cfg: Config | None = None
    loading = True
    try:
        world = os.environ.get("WORLD_SIZE")
        cfg = load(argv[0], argv[1:], world_size=int(world) if world else 1)
        given = given_yaml(argv[0], argv[1:])
        loading = False
        if failed is print_failure and os.environ.get("RANK", "0") == "0":
            preflight(cfg)  # `pentad train` has done it before it started its ranks
        from .run import run  # after the configuration is known to be good: importing torch takes seconds

        return run(cfg, given)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        failure = describe(error, everywhere=loading)
        if cfg is not None:
            lines = tuple(hide(cfg, line) for line in failure.lines)
            failure = replace(failure, lines=lines, trace=hide(cfg, failure.trace))
        failed(failure)
        return failure.exit_code


def describe(error: BaseException, *, everywhere: bool = False) -> Failure:
    """The failure of this rank."""
    user = isinstance(error, UserError)
    first = str(error).partition("\n")[0]
    lines = [str(p) for p in error.problems] if isinstance(error, UserError) else [f"{type(error).__name__}: {first}"]
    return Failure(
        rank=int(os.environ.get("RANK", 0)),
        world=int(os.environ.get("WORLD_SIZE", 1)),
        at=time.time(),
        user=user,
        everywhere=everywhere,
        lines=tuple(" ".join(line.split()) for line in lines),
        trace="" if user else "".join(traceback.format_exception(error)),
    )


def print_failure(failure: Failure) -> None:
    """Prints the first failure of the job whole; what other ranks met after it in one line, user's mistakes not again.

    Under somebody else's launcher the ranks share nothing but its store, which decides who was first. Silence of all
    but rank 0 would not do: torchrun ends the other ranks as soon as one has left.
    """
    if _is_first(failure):
        print(failure.text(), file=sys.stderr, flush=True)
    elif not failure.user:
        print(f"rank {failure.rank} then stopped: {failure.lines[0]}", file=sys.stderr, flush=True)
    _tell_launcher()


def _is_first(failure: Failure) -> bool:
    """Whether no rank has failed before this one; true where the store cannot be reached."""
    if failure.world == 1:
        return True
    env = os.environ
    if failure.everywhere and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return failure.rank == 0  # nobody has made a store yet
    import torch.distributed as dist

    try:
        store = dist.TCPStore(
            env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=3)
        )
        return store.add(f"pentad/failures/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except Exception:
        return True


def _tell_launcher() -> None:
    """Leaves the message where torchrun looks for it, so that its own summary shows it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    error = sys.exception()
    if error is not None:
        ErrorHandler().record_exception(error)


if __name__ == "__main__":
    sys.exit(main())
