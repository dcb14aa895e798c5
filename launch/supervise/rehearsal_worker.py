"""A rank of `pentad rehearse`: `python -m pentad.launch.supervise.rehearsal_worker FOLDER CONFIG [key=value …]`.

It is a rank as any other, but that a signal makes its main thread hang while the process goes on to live.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from ...trainer.processes.leaving import leave
from .worker import work

HANG = signal.SIGRTMIN + 7
_FOREVER_S = 1e8
_AGAIN_S = 0.002


def _hang(number: int, frame: FrameType | None) -> None:
    """Sleeps, but not while the rank waits for others: it is to be the one that they wait for."""
    while frame is not None:
        if "/parallel/comm/" in frame.f_code.co_filename:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        frame = frame.f_back
    time.sleep(_FOREVER_S)


if __name__ == "__main__":
    for number in (HANG, signal.SIGALRM):
        signal.signal(number, _hang)
    leave(work(Path(sys.argv[1]), sys.argv[2:]))
