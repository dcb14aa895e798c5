"""torchrun's agent, which `pentad train` starts in its own session.

    python -m pentad.launch.supervise.agent FOLDER RANKS …

It is `torchrun --standalone` through its API, for two differences. torchrun answers SIGTERM and Ctrl-C by ending the
ranks and failing, while we want them to finish a step and save: so the launcher signals the ranks itself, and the agent
only sees them leave. And it prints its own account of a failure, under which the cause disappears: here the launcher
reports, from what the ranks left in FOLDER.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ...trainer.processes.leaving import leave
from ...trainer.processes.orphans import signal_self_when_orphaned
from .worker_files import publish_text


def launch(folder: Path, ranks: int, command: list[str]) -> int:
    """Starts the ranks on this machine and waits for them.

    Args:
        folder: where the exit codes of failed ranks are left, as `exits` (JSON: rank to code).
        ranks: how many.
        command: arguments of the Python interpreter.

    Returns:
        0, 1 if a rank failed, or 128 plus the signal that ended the agent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # A batch system signals every process; the launcher decides. Not SIG_IGN, which the ranks would inherit.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal_self_when_orphaned(signal.SIGKILL)  # the ranks, orphaned in turn, save and end
    logging.disable(logging.ERROR)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        role="rank",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        exits = {rank: failure.exitcode for rank, failure in error.failures.items()}
        publish_text(folder / "exits", json.dumps(exits))
        return 1
    except SignalException as signalled:
        return 128 + signalled.sigval
    return 0


if __name__ == "__main__":
    leave(launch(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))  # taking torch down takes half a second
