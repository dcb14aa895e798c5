"""Jobs with faults, and what is to be looked at afterwards."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pentad.parallel.record.diagnosis import Verdict
from pentad.parallel.record.reader import read
from pentad.parallel.record.ring import HEADER_BYTES
from pentad.parallel.record.vitals import OUT_WORD, TOLD_WORD
from tests.jobs import DENSE
from tests.launch.chaos.inject import KINDS, Fault

ALIVE_S, HANG_S, PAUSE_S = 2.5, 5.0, 8.0
_SMALL = [
    *("name=a", "model.layers=4", "model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=32"),
    *("model.vocab=320", "train.seq_len=16", "train.global_batch=8", "train.micro_batch=1", "train.steps=100000"),
    *("eval.every=0", "hardware.peak_tflops=1", "optim.schedule.warmup_steps=0", "log.every=1000"),
    *(f"faults.alive_s={ALIVE_S}", f"faults.hang_s={HANG_S}", f"faults.pause_s={PAUSE_S}", "faults.timeout_s=60"),
]
LAYOUTS = {
    "tp2 pp2 dp2": ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2"],
    "ep4 cp2": [
        *("parallel.tp=1", "parallel.cp=2", "parallel.dp=4", "parallel.ep=4", "parallel.data.sharding=ddp"),
        *("model.family=mixtral", "model.moe.experts=8", "model.moe.top_k=2"),
    ],
}
WORLD = 8


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Args:
        verdict: what the watcher wrote.
        first: the first line that the user saw.
        seen_s: from the fault to the verdict.
        out_s: until the last survivor was out of its wait, from when it was told.
        over_s: from the fault to the end of all processes.
        left: what is still there and should not be.
    """

    verdict: Verdict | None
    first: str
    seen_s: float
    out_s: float
    over_s: float
    left: tuple[str, ...]


def draw(seed: int) -> tuple[str, Fault]:
    """A layout and a fault: every kind in turn, the rest by the seed."""
    draws = random.Random(seed)
    kinds, layouts = list(KINDS), list(LAYOUTS)
    kind = kinds[seed % len(kinds)]
    layout = layouts[seed // len(kinds) % len(layouts)]
    return layout, Fault(kind, draws.randrange(WORLD), draws.randrange(2, 4), draws.randrange(12), "")


class Zygote:
    """The process that makes ranks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.chaos.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, folder: Path, layout: str, fault: Fault | None, *more: str, timeout_s: float = 120.0) -> Outcome:
        """Runs a job of eight ranks until it is over."""
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        mark = folder / "mark"
        if fault is not None:
            fault = Fault(**{**asdict(fault), "mark": str(mark)})
        every = ["checkpoint.every=1"] if fault is not None and fault.kind == "writer" else []
        argv = [DENSE, *_SMALL, *LAYOUTS[layout], *every, f"runs_dir={folder}", *more]
        job = {"argv": argv, "world": WORLD, "folder": str(folder), "port": port}
        job["fault"] = None if fault is None else asdict(fault)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        done = json.loads(self._process.stdout.readline())
        at = float(mark.read_text()) if mark.exists() else done["ended"]
        return _outcome(folder, port, at, done["ended"])


def _outcome(folder: Path, port: int, at: float, ended: float) -> Outcome:
    run = folder / "a"
    deadline = time.monotonic() + 10
    while _left(folder, port) and time.monotonic() < deadline:
        time.sleep(0.05)
    verdict = None
    if (run / "record" / "verdict.json").exists():
        verdict = Verdict.load(json.loads((run / "record" / "verdict.json").read_text()))
    lines = (folder / "stderr").read_text().splitlines()
    causes = set(verdict.ranks) if verdict is not None else set()
    outs = [_out_s(ring) for ring in sorted((run / "record").glob("*.ring")) if read(ring).header.rank not in causes]
    return Outcome(
        verdict,
        lines[0] if lines else "",
        (verdict.at if verdict is not None else ended) - at,
        max(outs, default=0.0),
        ended - at,
        _left(folder, port),
    )


def _out_s(ring: Path) -> float:
    words = memoryview(ring.read_bytes()[:HEADER_BYTES]).cast("q")
    return (words[OUT_WORD] - words[TOLD_WORD]) / 1e9


def _left(folder: Path, port: int) -> tuple[str, ...]:
    """Processes, rings and unfinished files of a job."""
    found = [str(path) for path in Path("/dev/shm").glob(f"pentad-*-{port}-*.ring")]
    found += [str(path) for path in folder.rglob("*.partial")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(f"process {process.name}: {command[:80]}")
    return tuple(found)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def right(fault: Fault, outcome: Outcome) -> bool:
    """Whether rank and class were named."""
    verdict = outcome.verdict
    return verdict is not None and (verdict.kind, verdict.ranks) == (KINDS[fault.kind], (fault.rank,))


def main(argv: list[str]) -> None:
    """`python -m tests.launch.chaos.harness FROM TO FOLDER`: a line a fault."""
    first, last, folder = int(argv[0]), int(argv[1]), Path(argv[2])
    zygote = Zygote()
    good = 0
    for seed in range(first, last):
        layout, fault = draw(seed)
        shutil.rmtree(folder / str(seed), ignore_errors=True)
        began = time.monotonic()
        outcome = zygote.run(folder / str(seed), layout, fault)
        good += right(fault, outcome)
        about: dict[str, Any] = {"seed": seed, "layout": layout, "kind": fault.kind, "rank": fault.rank}
        times = {"seen": outcome.seen_s, "out": outcome.out_s, "over": outcome.over_s, "s": time.monotonic() - began}
        print("ok " if right(fault, outcome) else "BAD", about, {k: round(v, 3) for k, v in times.items()}, flush=True)
        verdict = outcome.verdict
        if verdict is None or not right(fault, outcome) or outcome.left or outcome.first != f"error: {verdict.line}":
            print("    ", verdict and (verdict.kind, verdict.ranks, verdict.line), "|", outcome.first)
            print("    ", outcome.left, flush=True)
    zygote.close()
    print(good, "of", last - first)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv[1:])
