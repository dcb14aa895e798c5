"""Where a job's ranks meet: a store in a process of its own, `python -m … FOLDER PORT`, which outlives any rank.

It ends with the node's fork server, which starts it, and where the ranks could not begin not before all of them know.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from ....trainer.processes.leaving import leave
from ....trainer.processes.meeting import STORE_PREFIX, wait_until_told
from ..worker_files import STORE, publish_text

_LOOK_S = 0.1


def keep_store(folder: Path, port: int) -> int:
    """Serves until the process that has started this one is gone.

    Args:
        folder: of the job on this node, where the port is written down.
        port: where to listen; 0: anywhere.
    """
    parent = os.getppid()
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, OSError) as error:
        print(f"error: nobody can meet at port {port}: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
        return 1
    publish_text(folder / STORE, str(store.port))
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    start, world = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
    wait_until_told(dist.PrefixStore(STORE_PREFIX.format(start), store), int(world))
    return 0


if __name__ == "__main__":
    leave(keep_store(Path(sys.argv[1]), int(sys.argv[2])))
