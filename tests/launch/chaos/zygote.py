"""A process that has imported everything and makes the ranks of one job after another by forking, in 0.1 s.

    python -m tests.launch.chaos.zygote    jobs come in as lines of JSON, and what became of them goes out so

A job's ranks are as under anyone's launcher: they have RANK and its like, and the first one starts the watcher.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pentad.trainer.__main__ as rank_main
import pentad.trainer.run  # noqa: F401
from tests.launch.chaos.inject import Fault, inject


def _rank(job: dict[str, Any], rank: int) -> None:
    """A rank's whole life, in a fork."""
    world, folder = job["world"], Path(job["folder"])
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job["port"]),
        OMP_NUM_THREADS="1",
    )
    for number, name in ((1, "stdout"), (2, "stderr")):
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, number)
    fault = Fault(**job["fault"]) if job["fault"] is not None else None
    if fault is not None and fault.rank == rank:
        inject(fault)
    code = 99
    try:
        code = rank_main.main(job["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serves jobs until the input ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pids = {}
        for rank in range(job["world"]):
            pid = os.fork()
            if not pid:
                _rank(job, rank)
            pids[pid] = rank
        codes: dict[int, int] = {}
        while pids:
            pid, status = os.wait()
            if pid in pids:
                codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        print(json.dumps({"codes": codes, "ended": time.time()}), flush=True)


if __name__ == "__main__":
    main()
