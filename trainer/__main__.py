"""One rank of a job: `torchrun … -m pentad.trainer CONFIG [key=value …]`, or under srun, mpirun and their like."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ..configs import Config, UserError, given_yaml, load
from ..configs.tables.imports import OPTION, import_modules, take_imports
from .memory.plan import decided
from .preflight import preflight
from .processes.failure import Failure
from .processes.guarding import become_guardian, guardable
from .processes.launchers import place
from .processes.leaving import leave
from .processes.meeting import Stopped
from .processes.orphans import signal_self_when_orphaned
from .processes.signals import NOTICES, StopRequest
from .processes.start import Start
from .processes.watch import WatchRequest
from .recovery.plan import Membership
from .run_folder import FRESH, claim

USAGE = f"usage: torchrun … -m pentad.trainer [{FRESH}] [{OPTION} MODULE …] CONFIG [key=value …]"


def main(
    argv: Sequence[str] | None = None,
    failed: Callable[[Failure], None] | None = None,
    job: Callable[[Config, Start], int] | None = None,
    watch: Callable[[WatchRequest], None] | None = None,
    membership: Membership | None = None,
) -> int:
    """Runs this rank of the job.

    Args:
        argv: CONFIG and overrides, and perhaps --fresh and --import MODULE; none: the command line's.
        failed: told about the failure instead of it being printed.
        job: what the rank does; none: it trains.
        watch: asked for a watcher of this node; none: one is started.
        membership: from where plans come, where faults can be mended. A process whose number is none of the ranks' at
            the start has an environment made for it, which says no launcher's.

    Returns:
        The exit code: 0, 2 for a user's mistake, 1 for any other error; for signal n `faults.stop_code`, or 128 + n
        where that is 0 and no step was begun.
    """
    # Before torch is imported: what its threads write about the end of a peer, a stack of C++ addresses, would bury the
    # line of ours that names the rank and the reason.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        modules, argv = take_imports(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fresh, argv = FRESH in argv, [a for a in argv if a != FRESH]
    if not argv or argv[0].startswith("-"):
        print(f"error: no CONFIG; {USAGE}", file=sys.stderr)
        return 2
    stop = StopRequest().listen(NOTICES)
    try:
        newcomer = membership is not None and membership.newcomer
        env = {**os.environ, **({} if newcomer else place(os.environ))}
        if membership is not None or "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "RANK" not in os.environ):
            signal_self_when_orphaned(signal.SIGTERM)  # a rank does not outlive what started it
        start = Start.of(env, stop, config=argv[0], fresh=fresh, failed=failed, watch=watch)
        start.membership = membership
    except UserError as error:
        stop.close()
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        with ExitStack() as held:
            return _run(start, modules, argv[1:], held, job, alone=failed is None)
    finally:
        start.meeting.leave()
        stop.close()


def _run(
    start: Start,
    modules: Sequence[str],
    overrides: Sequence[str],
    held: ExitStack,
    job: Callable[[Config, Start], int] | None = None,
    *,
    alone: bool,
) -> int:
    """`held` takes what the job holds until it ends; `alone`: no `pentad train` has looked at the job before."""
    cfg: Config | None = None
    loading = True
    try:
        import_modules(modules)
        cfg = decided(load(start.config, overrides, world_size=start.meeting.world))
        start.given = given_yaml(start.config, overrides)
        loading = False
        if not cfg.faults.recover:
            start.membership = None
        elif alone and start.membership is None and guardable(start.env):
            options = [argument for name in modules for argument in (OPTION, name)]
            argv = [*([FRESH] if start.fresh else []), *options, start.config, *overrides]
            become_guardian(cfg, argv, start.env)
        if start.meeting.rank == 0:
            if alone:
                preflight(cfg)
            if cfg.faults.recover and start.membership is None:
                what = "no fault is mended under this launcher, which gives no LOCAL_RANK: the first one ends the job"
                print(f"warning: faults.recover: {what}; docs/recovery.md", file=sys.stderr, flush=True)
            held.push(claim(cfg, fresh=start.fresh, config=start.config, env=start.env))
        from .job.run import run  # after the configuration is known to be good: importing torch takes seconds

        return (job or run)(cfg, start)
    except KeyboardInterrupt:
        return 130
    except Stopped:
        start.meeting.tell("asked to stop before the first step", user=True)
        return (cfg.faults.stop_code if cfg is not None else 0) or 128 + start.stop.number
    except Exception as error:
        failure = start.report(error, cfg, everywhere=loading)
        _tell_launcher(error, failure)
        return failure.exit_code


def _tell_launcher(error: Exception, failure: Failure) -> None:
    """Leaves the message where torchrun looks for it, so that its own summary shows it."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    if failure.user or failure.lost:  # one line: a traceback would only bury it
        with suppress(OSError):
            message = {"message": "; ".join(failure.lines), "timestamp": int(failure.at)}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(message))
        return
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    ErrorHandler().record_exception(error)


if __name__ == "__main__":
    leave(main())
