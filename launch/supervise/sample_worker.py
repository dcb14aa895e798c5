"""A rank of `pentad generate --layout run`: `python -m pentad.launch.supervise.sample_worker FOLDER CONFIG`."""

from __future__ import annotations

import sys
from pathlib import Path

from .worker import work

if __name__ == "__main__":
    from ...trainer.text.sample_run import sample

    sys.exit(work(Path(sys.argv[1]), sys.argv[2:], sample))
