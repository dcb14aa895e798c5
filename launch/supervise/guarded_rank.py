"""A rank of somebody else's launcher behind a guardian: `python -m pentad.launch.supervise.guarded_rank FOLDER …`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from ...parallel.comm.process_ids import ProcessId
from ...trainer.__main__ import main
from ...trainer.processes.leaving import leave
from ...trainer.processes.watch import WatchRequest
from ...trainer.recovery.plan import Membership
from .worker_files import WATCH, publish_text


def run_guarded(folder: Path, argv: list[str]) -> int:
    """Runs the rank that the environment names; its exit code."""
    rank = os.environ["RANK"]
    membership = Membership(folder, int(rank), int(os.environ["WORLD_SIZE"]))
    publish_text(folder / f"pid.{rank}", json.dumps(asdict(ProcessId.current())))

    def watch(request: WatchRequest) -> None:
        publish_text(folder / WATCH, request.dump())

    return main(argv, watch=watch, membership=membership)


if __name__ == "__main__":
    leave(run_guarded(Path(sys.argv[1]), sys.argv[2:]))
