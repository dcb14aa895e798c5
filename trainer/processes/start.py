"""How a rank was started, and whom it tells how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ...configs import Config, hide
from ...parallel.record.vitals import Vitals
from ..recovery.plan import Membership
from ..run_folder import run_folder
from .failure import Failure, failure_of, print_failure, write_failure
from .meeting import Meeting
from .signals import StopRequest
from .watch import WatchRequest, start_watcher

_VERDICT_S = 2.0
"""Seconds in which the watcher says why another rank was lost."""


@dataclass
class Start:
    """How this rank was started, and whom it tells how it ends."""

    config: str
    """The file, or the name of a job that comes with Pentad."""
    given: str
    """The configuration as the user gave it, as YAML."""
    fresh: bool
    """Whether an earlier run in the job's folder is moved aside."""
    env: Mapping[str, str]
    """The environment, with torch's names for what the launcher says."""
    meeting: Meeting
    stop: StopRequest
    failed: Callable[[Failure], None]
    watch: Callable[[WatchRequest], None] = start_watcher
    """Asks for a watcher of this node."""
    vitals: Vitals | None = None
    """This rank's signs of life, once it has a record that somebody watches."""
    membership: Membership | None = None
    """From where this rank learns who is in the next mesh; none: a fault ends the job."""
    failure: Failure | None = field(default=None)
    """Of this rank, once it was told."""

    @staticmethod
    def of(
        env: Mapping[str, str],
        stop: StopRequest,
        *,
        config: str = "",
        given: str = "",
        fresh: bool = False,
        failed: Callable[[Failure], None] | None = None,
        watch: Callable[[WatchRequest], None] | None = None,
    ) -> Start:
        """A rank that prints its failure, unless somebody is to be told instead."""
        meeting = Meeting(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), env, lambda: stop.requested)
        tell = failed or (lambda failure: print_failure(failure, meeting))
        return Start(config, given, fresh, env, meeting, stop, tell, watch or start_watcher)

    def report(self, error: BaseException, cfg: Config | None, *, everywhere: bool = False) -> Failure:
        """Tells why this rank ends; once."""
        if self.failure is None:
            rank, world = self.meeting.rank, self.meeting.world
            failure = failure_of(error, rank=rank, world=world, everywhere=everywhere)
            vitals = self.vitals
            if vitals is not None:
                vitals.out()
            if cfg is not None:
                lines = tuple(hide(cfg, line) for line in failure.lines)
                failure = replace(failure, lines=lines, trace=hide(cfg, failure.trace))
            if vitals is not None and cfg is not None:
                write_failure(run_folder(cfg), failure)
                vitals.failed()
                # Who has only lost another rank is no cause: the watcher knows it, and says it first.
                told = failure.lost and vitals.watched and soon(lambda: vitals.aborted, _VERDICT_S)
                failure = replace(failure, told=told or vitals.aborted)
            self.failure = failure
            self.failed(failure)
        return self.failure


def soon(holds: Callable[[], bool], seconds: float) -> bool:
    """Waits so long at most for something to hold; whether it does."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.005)
    return holds()
