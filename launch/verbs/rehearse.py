"""`pentad rehearse CONFIG --fault kill:rank=3@step=20`: makes faults happen to a job, and says what became of it.

With `--nodes N` the job runs over nodes that share this machine, and `kill:node=1@step=20` takes a whole one away.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...configs import Config, Problem, UserError, load
from ...configs.errors import nearest
from ...configs.strict_json import JsonError
from ...configs.tables.imports import OPTION, import_modules
from ...parallel.record.files import RingFile, open_ring, read_index
from ...parallel.record.reader import RecordError, read_open
from ...trainer.memory.plan import decided
from ...trainer.metrics.summary import lines_of
from ...trainer.preflight import preflight
from ...trainer.run_folder import FRESH, RunFile, run_folder
from ..supervise.launcher import rank_environment, train
from ..supervise.nodes.pretended import PretendedNodes
from ..supervise.supervisor import POLL_S, caught_signals

_KINDS = ("kill", "stop", "hang")
_FAULT = re.compile(r"([a-z]+):(rank|node)=(\d{1,6})@step=(\d{1,9})")
_AFTER = 5
"""Steps that the job goes on after the last fault."""
_LOOK_S = 0.005
_WORKER = "pentad.launch.supervise.rehearsal_worker"


@dataclass(frozen=True)
class RehearsedFault:
    """What is to happen, and what came of it.

    Args:
        kind: kill (SIGKILL), stop (SIGSTOP), hang (the main thread sleeps, the process lives).
        rank: to whom: whoever is in this slot of the mesh.
        step: in which, from 1.
        at: Unix time at which it was done; 0: it was not.
        node: to whom, if not to a rank: everything on this node.
    """

    kind: str
    rank: int
    step: int
    at: float = 0.0
    node: int | None = None

    @property
    def whom(self) -> str:
        """`rank 3`, or `node 1`."""
        return f"rank {self.rank}" if self.node is None else f"node {self.node}"

    @staticmethod
    def parse(text: str, cfg: Config, nodes: int = 1) -> RehearsedFault:
        """From `kill:rank=3@step=20`, or of several nodes `kill:node=1@step=20`.

        Raises:
            UserError: it is something else, or the job has no such rank or step.
        """
        match = _FAULT.fullmatch(text)
        if match is None:
            raise UserError(f"--fault {text}: give KIND:rank=R@step=S, as kill:rank=0@step=3, or kill:node=N@step=S")
        kind, whom, number, step = match[1], match[2], int(match[3]), int(match[4])
        if kind not in _KINDS:
            meant = nearest(kind, _KINDS)
            hint = f"; set {meant}" if meant else ""
            raise UserError(f"--fault {text}: {kind} is none of {', '.join(_KINDS)}{hint}")
        if (kind == "hang" and nodes > 1) or (kind != "kill" and whom == "node"):
            raise UserError(f"--fault {text}: over several nodes there are kill and stop of a rank, and kill of a node")
        if whom == "node" and number >= (nodes if nodes > 1 else 0):
            has = f"there are nodes 0 to {nodes - 1}" if nodes > 1 else "the job has one node; give --nodes 2"
            raise UserError(f"--fault {text}: {has}")
        if whom == "rank" and number >= cfg.parallel.ranks:
            raise UserError(f"--fault {text}: the job has ranks 0 to {cfg.parallel.ranks - 1}")
        if not 1 <= step <= cfg.train.steps:
            raise UserError(Problem("train.steps", f"--fault {text}: the job has steps 1 to {cfg.train.steps}"))
        return RehearsedFault(kind, -1 if whom == "node" else number, step, node=number if whom == "node" else None)


def rehearse(
    config: str,
    overrides: Sequence[str],
    faults: Sequence[str],
    *,
    nodes: int = 1,
    imports: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Runs a job in a folder of its own, makes the faults happen, lets it go on for some steps, and stops it.

    Args:
        config, overrides, imports: as of `pentad train`.
        faults: as `RehearsedFault.parse` reads them.
        nodes: how many the ranks are spread over; all are on this machine.
        as_json: one JSON object at the end.

    Returns:
        0: every fault happened and was mended; 1: the job ended, or a fault could not be made to happen.

    Raises:
        UserError: what is wrong with job or faults, before anything is started.
    """
    own = [*overrides, "log.wandb=false", "log.tensorboard=false", "log.prometheus=null"]
    own.append(f"name={load(config, own).name}.rehearsal")
    cfg = load(config, own)
    if nodes < 1 or cfg.parallel.ranks % nodes:
        raise UserError(f"--nodes {nodes}: {cfg.parallel.ranks} ranks are to be spread evenly")
    wanted = sorted((RehearsedFault.parse(text, cfg, nodes) for text in faults), key=lambda fault: fault.step)
    if not wanted:
        raise UserError("--fault is missing: what is to happen, as --fault kill:rank=0@step=3")
    causing = _Causing(run_folder(cfg), wanted, cfg.train.steps)
    if nodes > 1:
        code = _over_nodes(cfg, nodes, [config, *own], imports, causing)
    else:
        causing.thread.start()
        code = train(config, own, fresh=True, imports=imports, worker=_WORKER)
    causing.over.set()
    causing.thread.join()
    found = _found(causing.done, lines_of(run_folder(cfg) / RunFile.EVENTS))
    mended = not code and len(causing.done) == len(wanted) and all("recovered" in each for each in found)
    if as_json:
        print(json.dumps({"code": code, "mended": mended, "faults": found}))
    else:
        print("\n".join(_words(found, wanted[len(causing.done) :], code)))
    return 0 if mended else 1


def _over_nodes(cfg: Config, nodes: int, argv: Sequence[str], imports: Sequence[str], causing: _Causing) -> int:
    """Runs the job over pretended nodes; its exit code."""
    import_modules(imports)
    preflight(decided(cfg))
    options = [argument for name in imports for argument in (OPTION, name)]
    ranks = cfg.parallel.ranks
    there = PretendedNodes(nodes, ranks // nodes, [FRESH, *options, *argv], rank_environment(ranks, cuda=False))
    causing.nodes = there
    try:
        with caught_signals() as caught:
            causing.thread.start()
            told = 0
            while None in there.codes() and told < 2:
                if len(caught) > told:
                    told = len(caught)
                    there.send(signal.SIGTERM)
                time.sleep(POLL_S)
        return there.exit_code() if told < 2 else 128 + caught[-1]
    finally:
        there.close()


class _Causing:
    """Makes faults happen to a job that this process starts."""

    def __init__(self, run: Path, wanted: Sequence[RehearsedFault], last: int) -> None:
        self._run, self._wanted, self._last = run, wanted, last
        self.done: list[RehearsedFault] = []
        self.nodes: PretendedNodes | None = None
        self.over = threading.Event()
        self._began = time.time()
        self.thread = threading.Thread(target=self._work, name="faults", daemon=True)

    def _work(self) -> None:
        for fault in self._wanted:
            ring = self._when(max(fault.rank, 0), fault.step)
            if ring is None:
                return
            self.done.append(replace(fault, at=time.time()))
            if self.nodes is not None and fault.node is not None:
                self.nodes.lose(fault.node)
            else:
                os.kill(ring.pid, _number(fault.kind))
            print(f"rehearsal: {fault.kind} of {fault.whom} in step {fault.step}", file=sys.stderr, flush=True)
        if self._when(0, self._wanted[-1].step + _AFTER, more=True) is not None:
            os.kill(os.getpid(), signal.SIGTERM)  # as somebody would who has seen enough

    def _when(self, rank: int, step: int, *, more: bool = False) -> RingFile | None:
        """The ring of whoever is in a slot, once it is in a step; `more`: after what came of the last fault. None: the
        job is over."""
        while not self.over.wait(_LOOK_S):
            with contextlib.suppress(OSError, RecordError, JsonError):
                index = self._run / "record" / "index.json"
                if index.stat().st_mtime < self._began:
                    continue
                rings = [ring for ring in read_index(self._run) if ring.rank == rank]
                ring = max(rings, key=lambda each: each.epoch)
                if self._step(ring) >= step or (more and self._step(ring) >= self._last):
                    return ring
        return None

    def _step(self, ring: RingFile) -> int:
        """Which step its rank is in, from 1; 0: none yet."""
        fd, _ = open_ring(Path(ring.file), ring)
        try:
            entries = read_open(fd, Path(ring.file), newest=64).entries
            here = entries[entries["epoch"] == ring.epoch]
            return int(here["step"].max()) + 1 if len(here) else 0
        finally:
            os.close(fd)


def _number(kind: str) -> int:
    from ..supervise.rehearsal_worker import HANG

    return {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "hang": HANG}[kind]


def _found(done: Sequence[RehearsedFault], events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came of each fault."""
    seen = [event for event in events if event["event"] in ("fault", "verdict")]
    recovered = {event["epoch"]: event for event in events if event["event"] == "recovered"}
    found: list[dict[str, Any]] = []
    for fault, event in zip(done, seen, strict=False):
        about = {**asdict(fault), "seen_s": round(max(event["time"] - fault.at, 0.0), 3), "verdict": event}
        mended = recovered.get(event.get("epoch", -1))
        found.append({**about, "recovered": mended} if mended is not None else about)
    return [*found, *(asdict(fault) for fault in done[len(found) :])]


def _words(found: Sequence[dict[str, Any]], undone: Sequence[RehearsedFault], code: int) -> list[str]:
    lines: list[str] = []
    for each in found:
        whom = f"rank {each['rank']}" if each["node"] is None else f"node {each['node']}"
        lines.append(f"{each['kind']} of {whom} in step {each['step']}:")
        if "verdict" not in each:
            lines.append("  nobody saw it")
            continue
        lines.append(f"  seen after {1e3 * each['seen_s']:.0f} ms: {each['verdict']['line']}")
        mended = each.get("recovered")
        if mended is None:
            lines.append("  the job ended" if each["verdict"]["event"] == "verdict" else "  the job did not go on")
            continue
        parts = ", ".join(f"{name} {ms:.0f}" for name, ms in mended["parts_ms"].items())
        again = f"{mended['redone']} step{'s' * (mended['redone'] != 1)} done again"
        lines.append(
            f"  {mended['rung']}: went on at step {mended['step']} after {mended['ms']:.0f} ms ({parts}); {again}"
        )
    lines += [f"{fault.kind} of {fault.whom} in step {fault.step}: the job was over before" for fault in undone]
    return [*lines, f"the job ended with exit code {code}"]
