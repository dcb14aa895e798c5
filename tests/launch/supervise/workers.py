"""Stand-ins for a rank, started by the real agent: ``python -m tests.launch.workers FOLDER HOW``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from pentad.launch.supervise.worker_files import VERDICT, publish_text
from pentad.parallel.comm.process_ids import ProcessId
from pentad.parallel.comm.processes import PeerGone
from pentad.parallel.record.diagnosis import Verdict
from pentad.trainer.processes.failure import failure_of
from pentad.trainer.processes.orphans import signal_self_when_orphaned


def _train_until_stopped(folder: Path, rank: str) -> int:
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    publish_text(folder / f"pid.{rank}", json.dumps(asdict(ProcessId.current())))
    for _ in range(600):
        if stop:
            time.sleep(0.3)  # the rest of the step, and saving
            (folder / f"saved.{rank}").touch()
            return 0
        time.sleep(0.05)
    return 3


def _fail(folder: Path, rank: str) -> int:
    """Rank 1 fails; the others fail a moment later, because of it."""
    time.sleep(0.0 if rank == "1" else 0.5)
    try:
        raise ArithmeticError(f"cause on {rank}")
    except ArithmeticError as error:
        publish_text(folder / f"failure.{rank}", json.dumps(failure_of(error, rank=int(rank), world=2).as_dict()))
    return 1


def _outlive(folder: Path, rank: str) -> int:
    """Rank 1 is killed; the other loses it, says so, and does not end."""
    publish_text(folder / f"pid.{rank}", json.dumps(asdict(ProcessId.current())))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    lost = failure_of(PeerGone("rank 1 cannot be reached"), rank=int(rank), world=2)
    publish_text(folder / f"failure.{rank}", json.dumps(lost.as_dict()))
    time.sleep(600)
    return 3


def _judged(folder: Path, rank: str) -> int:
    """The watcher says that rank 1 hangs; the other leaves, and takes long to end."""
    publish_text(folder / f"pid.{rank}", json.dumps(asdict(ProcessId.current())))
    if rank == "1":
        said = Verdict("hang", (1,), "rank 1 has not come on for 60.0 s", ("  rank 0: waited",), 3, 1, time.time())
        publish_text(folder / VERDICT, json.dumps(said.as_dict()))
    else:
        lost = failure_of(PeerGone("rank 1"), rank=int(rank), world=2)
        publish_text(folder / f"failure.{rank}", json.dumps(lost.as_dict()))
        (folder / f"left.{rank}").touch()
    time.sleep(600)
    return 3


def _unannounced(folder: Path, rank: str) -> int:
    """The watcher says that rank 1 hangs, before the other has come so far as to leave its process id."""
    publish_text(folder / f"{'pid' if rank == '1' else 'begun'}.{rank}", json.dumps(asdict(ProcessId.current())))
    if rank == "1":
        while not (folder / "begun.0").exists():
            time.sleep(0.01)
        said = Verdict("hang", (1,), "rank 1 has not come on for 60.0 s", (), 3, 1, time.time())
        publish_text(folder / VERDICT, json.dumps(said.as_dict()))
    time.sleep(600)
    return 3


def _orphan(folder: Path, rank: str) -> int:
    signal_self_when_orphaned(signal.SIGTERM)
    return _train_until_stopped(folder, rank)


def _die(folder: Path, rank: str) -> int:
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return _train_until_stopped(folder, rank)


def main() -> int:
    """Behaves as the second argument says."""
    folder, how = Path(sys.argv[1]), sys.argv[2]
    behaviours = {
        "train": _train_until_stopped,
        "fail": _fail,
        "die": _die,
        "outlive": _outlive,
        "orphan": _orphan,
        "judged": _judged,
        "unannounced": _unannounced,
    }
    return behaviours[how](folder, os.environ["RANK"])


if __name__ == "__main__":
    sys.exit(main())
