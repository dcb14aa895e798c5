"""What the watcher of a node takes: its CPU time while eight ranks record 500 entries a second each.

    python -m benchmarks.watcher_cost [--seconds 20]

CPU seconds of the watcher's process, by the kernel, without its start: it matters little what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pentad.parallel.record.ring import Recorder, create
from pentad.parallel.record.vitals import Heart
from pentad.trainer.processes.watch import WATCHER, WatchRequest

RANKS = 8
_RATE = 500


def main() -> None:
    """Prints the share of a core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure (20)")
    seconds = parser.parse_args().seconds
    stem = f"cost-{os.getpid()}"
    recorders = [create(stem, rank=rank, world=RANKS) for rank in range(RANKS)]
    hearts = [Heart(recorder.vitals) for recorder in recorders]
    with tempfile.TemporaryDirectory() as folder:
        request = WatchRequest(stem, folder, RANKS, RANKS, 10.0, 60.0, 300.0)
        watcher = subprocess.Popen([sys.executable, "-m", WATCHER, "-"], stdin=subprocess.PIPE)
        assert watcher.stdin is not None
        try:
            with watcher.stdin as words:
                words.write(request.dump().encode())
            _work(recorders, until=lambda: _watched(recorders, watcher))
            _work_for(recorders, 2.0)
            before, begin = _cpu_s(watcher.pid), time.monotonic()
            _work_for(recorders, seconds)
            used, took = _cpu_s(watcher.pid) - before, time.monotonic() - begin
        finally:
            watcher.kill()
            watcher.wait()
            for heart in hearts:
                heart.close()
            for recorder in recorders:
                with contextlib.suppress(OSError):
                    Path(str(recorder.path)).unlink()
    print(f"watcher of {RANKS} ranks: {used:.2f} s of CPU time in {took:.1f} s = {100 * used / took:.2f} % of a core")


def _watched(recorders: list[Recorder], watcher: subprocess.Popen[bytes]) -> bool:
    if watcher.poll() is not None:
        raise RuntimeError(f"the watcher ended with {watcher.returncode}")
    return all(recorder.vitals.watched for recorder in recorders)


def _work_for(recorders: list[Recorder], seconds: float) -> None:
    end = time.monotonic() + seconds
    _work(recorders, until=lambda: time.monotonic() > end)


def _work(recorders: list[Recorder], until: Callable[[], bool]) -> None:
    """Records as ranks do, until `until` holds."""
    while not until():
        for recorder in recorders:
            for _ in range(_RATE // 50):
                recorder.exit(recorder.enter(recorder.intern("F")))
        time.sleep(0.02)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
