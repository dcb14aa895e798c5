"""A lane whose jobs are late and end in any order."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

from pentad.parallel.comm.lane import Lane, Pending


class SlowLane(Lane):
    """Jobs late by random times, in threads of their own: two of them may end in the wrong order.

    Args:
        name, device, given: as of `Lane`.
        seed: of the times.
        most_s: the longest.
    """

    def __init__(self, name: str, device: Any = "cpu", *, seed: int, most_s: float = 0.01, **given: Any) -> None:
        super().__init__(name, device, **given)
        self._draws, self._most_s = random.Random(f"{seed} {name}"), most_s

    def submit(self, job: Any) -> Pending:
        pending, late = Pending(job, (0, 0, -1), self._abort, self.name, None), self._draws.random() * self._most_s

        def run() -> None:
            time.sleep(late)
            pending._run(None)

        threading.Thread(target=run, daemon=True).start()
        return pending
