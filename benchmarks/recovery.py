"""A rank is killed: how long until the next step that counts, and what is lost, beside what else there is.

    python benchmarks/recovery.py
    python benchmarks/recovery.py --rounds 5 --sides pentad torchrun

The same tiny model on four CPU processes of data parallelism, each side in turn, and rank 2 or 0 killed by SIGKILL in
the middle of training. `next step` is the time from the kill until a step is done that was not before it, `whole` until
one is done by four ranks again, `lost` the steps that were done again.

* `pentad`: `pentad train` with `faults.recover=true` and one spare; and without a spare (`respawn`).
* `torchrun`: DDP under `torchrun --max-restarts`, with a checkpoint after every step and
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which gloo does not come back.
* `torchft`: its DDP, every rank a replica group, the lighthouse's limit for a heartbeat as it is by default (5 s), and
  with 1 s (`torchft 1 s`). A killed group is started again at once. Needs `torchft`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pentad.parallel.record.files import read_index

RANKS, BATCH, LENGTH = 4, 8, 64
MODEL = {"layers": 2, "hidden": 64, "ffn": 176, "heads": 4, "kv_heads": 4, "vocab": 320}
PACE_S = 0.05
"""A step sleeps so long, on every side."""
_STEPS = 40
"""Before the kill."""
_LIMIT_S = 120.0
_LOOK_S = 0.002
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recovered:
    """After a kill.

    Args:
        next_s: until the next new step; none: the job was lost.
        whole_s: until one of four ranks; none: it did not come.
        lost: steps that were done again.
    """

    next_s: float | None
    whole_s: float | None
    lost: int


class Side:
    """A job whose processes say what steps they have done, in a file `beats`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.beats = folder, folder / "beats"
        self.env = {**os.environ, "BEATS": str(self.beats), "PYTHONPATH": _paths(), "OMP_NUM_THREADS": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        """Starts a process of the job."""
        with (self.folder / "out").open("ab") as out:
            process = subprocess.Popen(
                command, cwd=HERE, env={**self.env, **env}, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        return process

    def keep(self) -> None:
        """Called all the while: starts again what the side starts again itself in use."""

    def rows(self) -> list[dict[str, Any]]:
        """What was said so far."""
        lines = self.beats.read_text().splitlines(keepends=True) if self.beats.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        os.kill([row["pid"] for row in self.rows() if row["rank"] == rank][-1], signal.SIGKILL)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in {row["pid"] for row in self.rows()}:  # torchrun's ranks have sessions of their own
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


class Pentad(Side):
    """Ours; its ranks' beats are those of a metric (`recovery_beat.py`)."""

    def __init__(self, folder: Path, spares: int) -> None:
        super().__init__(folder)
        config = folder / "job.json"
        job = {
            **{"name": "job", "runs_dir": str(folder), "model": MODEL, "parallel": {"dp": RANKS}},
            "train": {"steps": 100_000, "seq_len": LENGTH, "global_batch": BATCH, "micro_batch": 2, "dtype": "fp32"},
            **{"data": {"name": "stdlib"}, "checkpoint": {"every": 0}, "eval": {"every": 0}},
            "faults": {"recover": True, "spares": spares},
        }
        config.write_text(json.dumps(job))
        command = (sys.executable, "-m", "pentad.launch.cli", "train", str(config), "train.device=cpu")
        self.start(*command, "--import", "recovery_beat")

    def kill(self, rank: int) -> None:
        rings = [ring for ring in read_index(self.folder / "job") if ring.rank == rank]
        os.kill(max(rings, key=lambda ring: ring.epoch).pid, signal.SIGKILL)


class Torchrun(Side):
    """Restarts of all ranks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        run = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=3")
        self.start(sys.executable, *run, "-m", "peers.torchrun_restart", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


class Torchft(Side):
    """Replica groups of one process each."""

    def __init__(self, folder: Path, heartbeat_ms: int) -> None:
        super().__init__(folder)
        from torchft.coordination import LighthouseServer  # type: ignore[import-not-found]

        self._house = LighthouseServer(
            bind="[::]:0", min_replicas=2, join_timeout_ms=1000, heartbeat_timeout_ms=heartbeat_ms
        )
        self.env |= {"TORCHFT_LIGHTHOUSE": self._house.address()}
        self._groups = {rank: self._group(rank) for rank in range(RANKS)}

    def _group(self, rank: int) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, "-m", "peers.torchft_replicas", REPLICA=str(rank))

    def keep(self) -> None:
        for rank, process in self._groups.items():
            if process.poll() is not None:
                self._groups[rank] = self._group(rank)

    def close(self) -> None:
        super().close()
        self._house.shutdown()


SIDES: dict[str, Callable[[Path], Side]] = {
    "pentad": lambda folder: Pentad(folder, 1),
    "pentad, no spare": lambda folder: Pentad(folder, 0),
    "torchrun": Torchrun,
    "torchft": lambda folder: Torchft(folder, 5000),
    "torchft 1 s": lambda folder: Torchft(folder, 1000),
}


def _paths() -> str:
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


def _until(side: Side, done: Callable[[list[dict[str, Any]]], bool]) -> bool:
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        side.keep()
        if done(side.rows()):
            return True
        time.sleep(_LOOK_S)
    return False


def _by_step(rows: list[dict[str, Any]]) -> dict[int, dict[int, float]]:
    """When each process did each step."""
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["step"], {})[row["pid"]] = row["time"]
    return found


def measure(side: Side, rank: int) -> Recovered:
    """Lets a job train, kills a rank, and waits until all four train again.

    Raises:
        RuntimeError: it did not begin.
    """
    if not _until(side, lambda rows: any(row["step"] > _STEPS for row in rows)):
        raise RuntimeError(f"it did not begin: {(side.folder / 'out').read_text()[-2000:]}")
    at = time.time()
    side.kill(rank)
    before = max(row["step"] for row in side.rows() if row["time"] <= at)

    def new(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Not the step that was being done, which some may have ended all the same."""
        return [row for row in rows if row["step"] > before + 1]

    def whole(rows: list[dict[str, Any]]) -> list[float]:
        return [max(each.values()) for each in _by_step(new(rows)).values() if len(each) == RANKS]

    if not _until(side, lambda rows: bool(new(rows))):
        return Recovered(None, None, before)
    again = {row["step"] for row in side.rows() if row["time"] > at and row["step"] <= before}
    next_s = min(row["time"] for row in new(side.rows())) - at
    came = _until(side, lambda rows: bool(whole(rows)))
    return Recovered(next_s, min(whole(side.rows())) - at if came else None, len(again))


def rounds(names: list[str], count: int) -> Iterator[tuple[str, Recovered]]:
    """Each side in turn."""
    for number in range(count):
        for name in names:
            folder = Path(tempfile.mkdtemp(prefix="recovery-"))
            side = SIDES[name](folder)
            try:
                yield name, measure(side, (2, 0)[number % 2])
            finally:
                side.close()
                shutil.rmtree(folder, ignore_errors=True)


def _middle(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    lost = f", {len(values) - len(known)} of {len(values)} never" if len(known) < len(values) else ""
    return f"{statistics.median(known):6.2f} s ({min(known):.2f} to {max(known):.2f}){lost}" if known else "never"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    wanted = parser.parse_args()
    found: dict[str, list[Recovered]] = {name: [] for name in wanted.sides}
    for name, recovered in rounds(wanted.sides, wanted.rounds):
        found[name].append(recovered)
        print(name, recovered, flush=True)
    for name, each in found.items():
        lost = [one.lost for one in each]
        first, whole = (_middle([getattr(one, key) for one in each]) for key in ("next_s", "whole_s"))
        print(f"{name:17} next {first}, whole {whole}, lost {statistics.median(lost):.0f} ({min(lost)} to {max(lost)})")


if __name__ == "__main__":
    main()
