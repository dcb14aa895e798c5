"""What the watcher of a node is told by its first rank, and how that rank starts one where no `pentad train` did."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

from ...configs.strict_json import expect_int, expect_number, expect_object, expect_text, parse_json

WATCHER = "pentad.launch.supervise.watcher"
"""The module that is a watcher; a string, for this room knows nothing of the one above it."""


@dataclass(frozen=True)
class WatchRequest:
    """What a node's watcher is asked to watch.

    Args:
        stem: of the names of the rings: `pentad-STEM-RANK.ring`.
        run_dir: the run's folder.
        world: ranks of the job.
        local: ranks of this node.
        alive_s, hang_s, pause_s: see `faults.*`.
    """

    stem: str
    run_dir: str
    world: int
    local: int
    alive_s: float
    hang_s: float
    pause_s: float

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: bytes) -> WatchRequest:
        """What `dump` wrote.

        Raises:
            JsonError: something else.
        """
        known = expect_object(parse_json(text), "a request to watch", WatchRequest.__dataclass_fields__)
        return WatchRequest(
            expect_text(known["stem"], "stem"),
            expect_text(known["run_dir"], "run_dir"),
            expect_int(known["world"], "world", 1),
            expect_int(known["local"], "local", 1),
            expect_number(known["alive_s"], "alive_s"),
            expect_number(known["hang_s"], "hang_s"),
            expect_number(known["pause_s"], "pause_s"),
        )


def start_watcher(request: WatchRequest) -> None:
    """Starts a watcher that outlives this rank and ends with the last rank of the node. A job runs without one too."""
    with contextlib.suppress(OSError):
        subprocess.Popen(
            [sys.executable, "-m", WATCHER, request.dump()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
