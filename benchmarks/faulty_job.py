"""A job of ours under `pentad train` that a benchmark does something to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pentad.parallel.record.files import read_index

WAIT_S = 60.0
_LOOK_S = 0.005


class FaultyJob:
    """A job under `pentad train`, of which this process can find every part."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], *more: str) -> None:
        self.run = folder / name
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**config, "name": name, "runs_dir": str(folder)}))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pentad.launch.cli", "train", str(file), "train.device=cpu", *more],
            cwd=Path(__file__).parent,
            stdout=(folder / f"{name}.out").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def events(self) -> list[dict[str, Any]]:
        """Of events.jsonl, which may be growing."""
        file = self.run / "events.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        """Steps that are reported."""
        file = self.run / "metrics.jsonl"
        with contextlib.suppress(OSError, IndexError, ValueError), file.open("rb") as lines:
            lines.seek(max(0, file.stat().st_size - (1 << 14)))
            return int(json.loads(lines.read().splitlines()[-2])["step"])
        return 0

    def ranks(self) -> dict[int, int]:
        """Process id by slot, of the newest mesh."""
        rings = read_index(self.run)
        newest = max(ring.epoch for ring in rings)
        return {ring.rank: ring.pid for ring in rings if ring.epoch == newest}

    def family(self) -> list[int]:
        """Every process of the job."""
        found = list[int]()
        for each in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(each.name)) == self.process.pid or self._names(each):
                    found.append(int(each.name))
        return found

    def spares(self, ranks: dict[int, int]) -> set[int]:
        """Processes that were forked as ranks are, and have no slot."""
        forked = {parent_of(pid) for pid in ranks.values()} - {0}
        return {pid for pid in self.family() if parent_of(pid) in forked} - set(ranks.values())

    def _names(self, process: Path) -> bool:
        return str(self.run) in (process / "cmdline").read_bytes().decode(errors="replace")

    def until(self, done: Callable[[], bool], seconds: float = WAIT_S) -> bool:
        """Waits for something; whether it came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if done():
                return True
            time.sleep(_LOOK_S)
        return done()

    def stop(self) -> int:
        """Asks it to stop, and waits; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(WAIT_S)
        finally:
            for pid in self.family():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    """Of a process that lives; else 0."""
    with contextlib.suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
        return 0 if state == "Z" else int(parent)
    return 0
