"""Threads for files: in order, errors passed on, and nobody waits for a thread that never comes."""

from __future__ import annotations

import _thread
import threading
import time
from typing import Any

import pytest

from pentad.trainer.processes.threads import Beside, map_threads


def test_results_come_in_order_from_several_threads_at_once() -> None:
    meeting = threading.Barrier(4, timeout=30)

    def square(n: int) -> int:
        if n < 4:
            meeting.wait()  # only four at once get past
        return n * n

    assert map_threads(square, range(20), 4) == [n * n for n in range(20)]
    assert map_threads(square, [], 4) == []
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda n: 1 // n, [1, 0, 2], 2)


@pytest.mark.parametrize("kind", ["refused", "dies before it runs"])
def test_without_memory_for_threads_the_calling_one_does_all(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def start(*_: Any) -> int:
        if kind == "refused":
            raise RuntimeError("can't start new thread")
        return 0

    monkeypatch.setattr(_thread, "start_new_thread", start)
    assert map_threads(lambda n: n + 1, range(10), 4) == list(range(1, 11))


def test_a_job_beside_ends_before_the_next_and_survives_its_error() -> None:
    beside, seen = Beside("test"), []

    def slow() -> None:
        time.sleep(0.05)
        seen.append("slow")

    def fails() -> None:
        seen.append("fails")
        raise MemoryError

    for job in (slow, fails, slow):
        beside.run(job)
        beside.join()
    assert seen == ["slow", "fails", "slow"]
    beside.close()
