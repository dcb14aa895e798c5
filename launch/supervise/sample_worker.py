"""A rank of `pentad generate --layout run`: `python -m pentad.launch.supervise.sample_worker FOLDER CONFIG`."""

from __future__ import annotations

import sys
from pathlib import Path

from ...trainer.processes.leaving import leave
from .worker import work

if __name__ == "__main__":
    from ...trainer.text.sample_run import sample

    leave(work(Path(sys.argv[1]), sys.argv[2:], sample))
