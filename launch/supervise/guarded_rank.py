"""A rank of somebody else's launcher behind a guardian: `python -m pentad.launch.supervise.guarded_rank FOLDER …`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ...trainer.__main__ import main
from ...trainer.processes.leaving import leave
from ...trainer.processes.watch import WatchRequest
from ...trainer.recovery.plan import Membership
from .worker_files import WATCH, publish_text


def run_guarded(folder: Path, argv: list[str]) -> int:
    """Runs the rank that the environment names; its exit code."""
    membership = Membership(folder, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    def watch(request: WatchRequest) -> None:
        publish_text(folder / WATCH, request.dump())

    return main(argv, watch=watch, membership=membership)


if __name__ == "__main__":
    leave(run_guarded(Path(sys.argv[1]), sys.argv[2:]))
