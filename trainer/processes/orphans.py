"""What a process does when the one that started it dies."""

from __future__ import annotations

import os
import signal
import threading
import time

INTERVAL_S = 1.0


def signal_self_when_orphaned(number: signal.Signals) -> None:
    """Sends this process `number` once its parent is gone, however it went (SIGKILL too).

    A rank then finishes its step, saves and ends, instead of training on unwatched.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(INTERVAL_S)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, name="orphans", daemon=True).start()
