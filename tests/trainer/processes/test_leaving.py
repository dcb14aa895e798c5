"""A process ends with the code that it means, whatever its threads are in the middle of."""

from __future__ import annotations

import os
import subprocess
import sys

_CODE = """
import atexit, sys, threading
import torch
from pentad.trainer.processes.leaving import leave

numbers, begun = torch.zeros(1 << 18), threading.Event()

def add():
    while True:
        torch.add(numbers, 1.0, out=numbers)
        begun.set()

atexit.register(print, "registered")
threading.Thread(target=add, daemon=True).start()
begun.wait()
print("said", end=" ")
leave(3)
"""


def test_a_thread_in_the_middle_of_a_sum_does_not_abort_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _CODE],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (ended.returncode, ended.stdout) == (3, "said registered\n"), ended.stderr
