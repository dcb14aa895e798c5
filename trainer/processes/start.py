"""How a rank was started, and whom it tells how it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ...configs import Config, hide
from .failure import Failure, failure_of, print_failure
from .meeting import Meeting
from .signals import StopRequest


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
    ) -> Start:
        """A rank that prints its failure, unless somebody is to be told instead."""
        meeting = Meeting(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), env, lambda: stop.requested)
        tell = failed or (lambda failure: print_failure(failure, meeting))
        return Start(config, given, fresh, env, meeting, stop, tell)

    def report(self, error: BaseException, cfg: Config | None, *, everywhere: bool = False) -> Failure:
        """Tells why this rank ends; once."""
        if self.failure is None:
            rank, world = self.meeting.rank, self.meeting.world
            failure = failure_of(error, rank=rank, world=world, everywhere=everywhere)
            if cfg is not None:
                lines = tuple(hide(cfg, line) for line in failure.lines)
                failure = replace(failure, lines=lines, trace=hide(cfg, failure.trace))
            self.failure = failure
            self.failed(failure)
        return self.failure
