"""Jobs with faults, and what is to be looked at afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pentad.parallel.record.diagnosis import Verdict
from pentad.parallel.record.reader import read
from pentad.parallel.record.ring import HEADER_BYTES
from pentad.parallel.record.vitals import OUT_WORD, TOLD_WORD
from pentad.trainer.__main__ import main as rank_main
from tests.jobs import DENSE
from tests.launch.chaos.inject import GLOBAL_BATCH, KINDS, SLOW, Fault, inject

ALIVE_S, HANG_S, PAUSE_S = 2.5, 5.0, 8.0
SMALL = [
    *("name=a", "model.layers=4", "model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=32"),
    *("model.vocab=320", "train.seq_len=16", "train.micro_batch=1", "train.steps=100000"),
    f"train.global_batch={GLOBAL_BATCH}",
    *("eval.every=0", "hardware.peak_tflops=1", "optim.schedule.warmup_steps=0", "log.every=1000"),
    *(f"faults.alive_s={ALIVE_S}", f"faults.hang_s={HANG_S}", f"faults.pause_s={PAUSE_S}", "faults.timeout_s=60"),
]
LAYOUTS = {
    "tp2 dp2": ["parallel.tp=2", "parallel.dp=2"],
    "tp2 pp2 dp2": ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2"],
    "ep4 cp2": [
        *("parallel.tp=1", "parallel.cp=2", "parallel.dp=4", "parallel.ep=4", "parallel.data.sharding=ddp"),
        *("model.family=mixtral", "model.moe.experts=8", "model.moe.top_k=2"),
    ],
}
_STEPS = 105
"""Of a job with a slow rank: five windows of 20 steps, whose rows are a step late, and some to spare."""
WORLDS = {"tp2 pp2 dp2": 8, "ep4 cp2": 8, "tp2 dp2": 4}


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Args:
        verdict: what the watcher wrote.
        first: the first line that the user saw.
        seen_s: from the fault to the verdict.
        out_s: until the last survivor was out of its wait, from when it was told.
        over_s: from the fault to the end of all ranks.
        codes: exit codes by rank.
        left: what is still there and should not be.
        stragglers: the events that name a slow rank.
    """

    verdict: Verdict | None
    first: str
    seen_s: float
    out_s: float
    over_s: float
    codes: tuple[int, ...]
    left: tuple[str, ...]
    stragglers: tuple[dict[str, Any], ...] = ()


def draw(seed: int) -> tuple[str, Fault]:
    """A layout and a fault: every kind in turn, the rest by the seed."""
    draws = random.Random(seed)
    kinds, layouts = list(KINDS), ["tp2 pp2 dp2", "ep4 cp2"]
    kind = kinds[seed % len(kinds)]
    layout = layouts[seed // len(kinds) % len(layouts)]
    fault = Fault(kind, draws.randrange(WORLDS[layout]), draws.randrange(2, 4), draws.randrange(12), "")
    # Every layout of eight ranks has something to say to the neighbour at any distance that is a power of two.
    return layout, replace(fault, peer=fault.rank ^ draws.choice((1, 2, 4))) if kind == "slow link" else fault


def run_job(folder: Path, layout: str, fault: Fault | None, *more: str, nodes: int = 1) -> Outcome:
    """Runs a job until it is over. Its ranks are forked from the server that `run_distributed` has, and are as under
    anyone's launcher: they have RANK and its like, and the first one starts the watcher."""
    folder.mkdir(parents=True, exist_ok=True)
    port, mark, world = _free_port(), folder / "mark", WORLDS[layout]
    if fault is not None:
        fault = replace(fault, mark=str(mark))
    # Only the last save of a run waits for one that hangs.
    every = ["checkpoint.every=1", "train.steps=6"] if fault is not None and fault.kind == "writer" else []
    slow = [f"train.steps={_STEPS}"] if fault is not None and fault.kind in SLOW else []
    argv = [DENSE, *SMALL, *LAYOUTS[layout], *every, *slow, f"runs_dir={folder}", *more]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.worker_imports"])
    job = (argv, world, world // nodes, str(folder), port, fault, os.getpid())
    ranks = [context.Process(target=_rank, args=(rank, *job)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    ended = time.time()
    for process in ranks:
        process.kill()
    at = float(mark.read_text()) if mark.exists() else ended
    return _outcome(folder, port, at, ended, tuple(process.exitcode or 0 for process in ranks))


def _end_with(parent: int) -> None:
    """Ends this process with the one that wants the job: the server that has made it lives on."""
    while Path(f"/proc/{parent}").exists():
        time.sleep(1)
    os._exit(98)


def _rank(
    rank: int, argv: list[str], world: int, local: int, folder: str, port: int, fault: Fault | None, parent: int
) -> None:
    """A rank's whole life."""
    facts = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    facts["MASTER_PORT"] = port
    os.environ.update({name: str(value) for name, value in facts.items()}, MASTER_ADDR="127.0.0.1")
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if fault is not None and fault.touches(rank):
        inject(fault, rank)
    code = 99
    try:
        code = rank_main(argv)
    finally:
        os._exit(code)


def _outcome(folder: Path, port: int, at: float, ended: float, codes: tuple[int, ...]) -> Outcome:
    run = folder / "a"
    said, deadline = run / "record" / "verdict.json", time.monotonic() + 10
    # On a busy machine the ranks may have left before the watcher has found words for a death.
    while (_left(folder, port) or (any(codes) and not said.exists())) and time.monotonic() < deadline:
        time.sleep(0.05)
    verdict, end = None, time.monotonic() + 1
    if said.exists():
        verdict = Verdict.load(json.loads(said.read_text()))
        while not (folder / "stderr").read_text() and time.monotonic() < end:
            time.sleep(0.05)
    # Notices, of saves that are passed over, come while the job goes on.
    lines = [line for line in (folder / "stderr").read_text().splitlines() if not line.startswith("pentad: ")]
    causes = set(verdict.ranks) if verdict is not None else set()
    stragglers = tuple(event for event in events_of(run) if event["event"] == "straggler")
    named = [*([verdict.at] if verdict is not None else []), *(event["time"] for event in stragglers), ended]
    outs = [_out_s(ring) for ring in sorted((run / "record").glob("*.ring")) if read(ring).header.rank not in causes]
    return Outcome(
        verdict,
        lines[0] if lines else "",
        named[0] - at,
        max(outs, default=0.0),
        ended - at,
        codes,
        _left(folder, port),
        stragglers,
    )


def events_of(run: Path) -> list[dict[str, Any]]:
    """What a run says in events.jsonl."""
    file = run / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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
    """Whether rank and class were named; of a slow rank or link by the readings, while the job goes on to its end."""
    verdict = outcome.verdict
    if fault.kind in SLOW:
        named = {(event["rank"], event["peer"], event["reason"]) for event in outcome.stragglers}
        ends = (min(fault.rank, fault.peer), max(fault.rank, fault.peer)) if fault.peer >= 0 else (fault.rank, None)
        return verdict is None and not any(outcome.codes) and named == {(*ends, KINDS[fault.kind])}
    return verdict is not None and (verdict.kind, verdict.ranks) == (KINDS[fault.kind], (fault.rank,))


def main(argv: list[str]) -> None:
    """`python -m tests.launch.chaos.harness FROM TO FOLDER`: a line a fault."""
    first, last, folder = int(argv[0]), int(argv[1]), Path(argv[2])
    good = 0
    for seed in range(first, last):
        layout, fault = draw(seed)
        shutil.rmtree(folder / str(seed), ignore_errors=True)
        began = time.monotonic()
        outcome = run_job(folder / str(seed), layout, fault)
        good += right(fault, outcome)
        about: dict[str, Any] = {"seed": seed, "layout": layout, "kind": fault.kind, "rank": fault.rank}
        times: dict[str, float] = {
            "seen": outcome.seen_s,
            "out": outcome.out_s,
            "over": outcome.over_s,
            "s": time.monotonic() - began,
        }
        print("ok " if right(fault, outcome) else "BAD", about, {k: round(v, 3) for k, v in times.items()}, flush=True)
        verdict = outcome.verdict
        said = fault.kind in SLOW or (verdict is not None and outcome.first == f"error: {verdict.line}")
        if not right(fault, outcome) or outcome.left or not said:
            print("    ", verdict and (verdict.kind, verdict.ranks, verdict.line), "|", outcome.first)
            print("    ", outcome.left, outcome.stragglers, flush=True)
    print(good, "of", last - first)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv[1:])
