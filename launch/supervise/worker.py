"""A rank that `pentad train` started: `python -m pentad.launch.supervise.worker FOLDER CONFIG [key=value …]`.

FOLDER is shared with the launcher: the rank leaves its process id there, and its failure if it fails.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ...configs import Config
from ...configs.validation.faults import STOP_CODES
from ...parallel.comm.process_ids import ProcessId
from ...trainer.__main__ import main
from ...trainer.processes.failure import Failure
from ...trainer.processes.leaving import leave
from ...trainer.processes.start import Start
from ...trainer.processes.watch import WatchRequest
from ...trainer.recovery.plan import Membership
from .worker_files import STOPPED, WATCH, publish_text


def work(folder: Path, argv: list[str], job: Callable[[Config, Start], int] | None = None) -> int:
    """Runs the rank that the environment names; its exit code. `job` as of `trainer.__main__.main`."""
    rank = os.environ["RANK"]
    membership = Membership(folder, int(rank), int(os.environ["WORLD_SIZE"]))
    publish_text(folder / f"pid.{rank}", json.dumps(asdict(ProcessId.current())))

    def failed(failure: Failure) -> None:
        publish_text(folder / f"failure.{rank}", json.dumps(failure.as_dict()))

    def watch(request: WatchRequest) -> None:
        publish_text(folder / WATCH, request.dump())

    try:
        code = main(argv, failed, job, watch, membership)
    finally:
        (folder / f"left.{rank}").touch()
    if code in STOP_CODES:
        (folder / STOPPED).touch()
        return 0  # to the agent, for which every other code is a failure
    return code


if __name__ == "__main__":
    leave(work(Path(sys.argv[1]), sys.argv[2:]))
