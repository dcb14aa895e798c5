"""Whole jobs as processes of this machine, of which some are killed; what a watcher would do, done by the test.

Every process runs `trainer.job.run` as under a launcher; the store is the test's. When a process is killed, the
stand-in for the watcher tells those that are left to leave their mesh, by their rings, and publishes the next plan.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pentad.configs.schema import Config, EvalConfig, HardwareConfig, TextData
from pentad.parallel.comm.mesh import Axis
from pentad.parallel.global_tensor import GlobalTensor
from pentad.parallel.record.ring import HEADER_BYTES, Recorder, ring_folders, ring_name
from pentad.parallel.record.vitals import ABORT_WORD, CHANGE_WORD, READY_WORD
from pentad.trainer.checkpoint.io import read_full
from pentad.trainer.checkpoint.names import checkpoints
from pentad.trainer.job.run import run
from pentad.trainer.processes.signals import StopRequest
from pentad.trainer.processes.start import Start
from pentad.trainer.recovery import restore
from pentad.trainer.recovery.plan import EpochPlan, Membership, end_plans, publish_plan
from pentad.trainer.recovery.restore import StateRestore
from pentad.trainer.recovery.snapshots import Snapshot
from pentad.trainer.step import Stepper
from pentad.trainer.trainer import Trainer
from tests.training import job, world_of

TEXT = Path(__file__).parents[3] / "docs" / "architecture.md"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Kill:
    """A process kills itself.

    Args:
        number: which.
        step: in which step of its record (0-based), in the first mesh in which it comes to it.
        entry: before it writes this entry of the step's record, counted from 0.
        kind: counts entries of this kind only; empty: all.
        after: at the entry's end instead.
    """

    number: int
    step: int
    entry: int
    kind: str = ""
    after: bool = False


@dataclass(frozen=True)
class Ran:
    """What a job left.

    Args:
        codes: exit code of every process, by number.
        metrics, events: lines of the files.
        state: tensors of the last checkpoint, by name.
        about: the checkpoint's own state.
        saved: steps of which there are checkpoints.
        taken: by number, the bytes that the process got whenever a mesh was made anew, its own state not counted.
        held: by number, what the process held whenever it began to train in a mesh: threads, descriptors, maps of
            shared memory.
        errors: tracebacks of processes that failed.
    """

    codes: dict[int, int]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    state: dict[str, torch.Tensor]
    about: dict[str, Any]
    saved: list[int]
    errors: dict[int, str]
    held: dict[int, list[list[int]]]
    taken: dict[int, list[int]]

    @property
    def curve(self) -> list[tuple[int, float, float, int]]:
        """Step, loss, gradient norm and tokens of every line."""
        return [(m["step"], m["loss"], m["grad_norm"], m["tokens"]) for m in self.metrics]

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "recovered"]


def small_job(folder: Path, **wanted: Any) -> Config:
    """A job of a few steps over a text of this repository.

    Args:
        folder: of its run.
        wanted: arguments of `job`; `faults`, `checkpoint`: further keys of these sections.
    """
    faults, saving, evaluation = (wanted.pop(name, {}) for name in ("faults", "checkpoint", "eval"))
    model = {"vocab": 264, **wanted.pop("model", {})}
    cfg = job(model=model, **{"steps": 6, **wanted})
    return replace(
        cfg,
        name=f"recovery-{uuid.uuid4().hex[:8]}",
        runs_dir=str(folder),
        data=TextData(paths=(str(TEXT),), cache=str(Path(tempfile.gettempdir()) / "pentad-recovery"), holdout=0.1),
        eval=EvalConfig(**evaluation),
        checkpoint=replace(cfg.checkpoint, dir=str(folder / "checkpoints"), **saving),
        faults=replace(cfg.faults, watch=False, **faults),
        hardware=HardwareConfig(peak_tflops=0.1),
    )


@dataclass
class StandIn:
    """The watcher's part, for one job.

    Args:
        cfg: the job.
        folder: where logs go.
        spares: processes that wait.
        kills: who is killed when.
        nodes: the pretended node of a process, by its number.
        anew: members by slot of meshes that are made without a fault, each once the one before has reported a step and
            whoever was to be killed is.
        gently: their ranks agree to leave after a step.
        layouts: of meshes of so many members; else data parallelism of their size.
        grow: decides likewise, while a mesh is smaller than the first; waiting spares → plan, or None: not now.
        whole_nodes: a node goes with the first of its processes, and with what is in its memory.
        plan: decides on the next mesh: members by slot, lost numbers and waiting spares → members, or a whole plan, or
            None: the end.
    """

    cfg: Config
    folder: Path
    spares: int = 0
    kills: tuple[Kill, ...] = ()
    plan: Callable[[tuple[int, ...], set[int], list[int]], tuple[int, ...] | EpochPlan | None] | None = None
    grow: Callable[[list[int]], EpochPlan | None] | None = None
    nodes: Callable[[int], int] = lambda number: 0
    whole_nodes: bool = False
    anew: tuple[tuple[int, ...], ...] = ()
    gently: bool = False
    layouts: Mapping[int, str] = field(default_factory=dict)
    _processes: dict[int, BaseProcess] = field(default_factory=dict)
    _port: int = 0

    def run(self) -> Ran:
        """Runs the job to its end."""
        shared = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="pentad-test-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._port = store.port
        try:
            self._start(shared, store.port)
            self._watch(shared)
        finally:
            for process in self._processes.values():
                process.kill()
                process.join()
            shutil.rmtree(shared)
            for number in self._processes:
                self._ring(number).unlink(missing_ok=True)
        return self._ran()

    def _start(self, shared: Path, port: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.worker_imports"])
        world = world_of(self.cfg)
        for number in range(world + self.spares):
            mine = tuple(kill for kill in self.kills if kill.number == number)
            arguments = (number, world, self.cfg, self.folder, self._folder_of(shared, number), port, mine)
            self._processes[number] = context.Process(target=_process, args=arguments, daemon=True)
            self._processes[number].start()

    def _folder_of(self, shared: Path, number: int) -> Path:
        """Of the copies and plans of a process's node."""
        folder = shared / f"node-{self.nodes(number)}"
        folder.mkdir(exist_ok=True)
        return folder

    def _take_nodes(self, shared: Path, nodes: set[int]) -> list[int]:
        """Kills what is left of nodes, and takes their memory; the numbers of their processes."""
        there = [number for number in self._processes if self.nodes(number) in nodes]
        for number in there:
            self._processes[number].kill()
            self._processes[number].join()
        for node in nodes:
            for path in (shared / f"node-{node}").glob("snapshot.*"):
                path.unlink()
        return there

    def _ring(self, number: int) -> Path:
        return ring_folders()[0] / ring_name(f"{self.cfg.name}-{self.cfg.name}-{self._port}", number)

    def _watch(self, shared: Path) -> None:
        members, epoch = tuple(range(world_of(self.cfg))), 0
        spares = [number for number in self._processes if number not in members]
        until = time.monotonic() + TIMEOUT_S
        running = {process.sentinel: number for number, process in self._processes.items()}
        anew, reported, died = list(self.anew), 0, 0
        while any(number in members for number in running.values()):
            if time.monotonic() > until:
                raise TimeoutError(f"the job did not end in {TIMEOUT_S:g} s; see {self.folder}")
            ended = [
                running.pop(sentinel)
                for sentinel in wait(list(running), 0.02 if anew or self.grow else 1.0)
                if isinstance(sentinel, int)
            ]
            seen = time.time()
            if self.whole_nodes and any(self._code(number) == -signal.SIGKILL for number in ended):
                ended = self._take_nodes(shared, {self.nodes(number) for number in ended})
                running = {sentinel: number for sentinel, number in running.items() if number not in ended}
            killed = {number for number in ended if self._code(number) == -signal.SIGKILL}
            failed = {number for number in ended if self._code(number) not in (0, -signal.SIGKILL)}
            spares = [number for number in spares if number not in ended]
            lost = killed & set(members)
            if failed & set(members):
                break
            died += len(lost)
            goes_on = self._reported() > reported
            grown = self.grow(spares) if self.grow and goes_on and len(members) < world_of(self.cfg) else None
            due = anew and goes_on and died >= len(self.kills)
            if not lost and not grown and not due:
                continue
            for number in members:
                if number in running.values():
                    self._tell(number, CHANGE_WORD if self.gently and not lost else ABORT_WORD, epoch)
            following = self._next(members, lost, spares) if lost else grown or anew.pop(0)
            if following is None:
                break
            plan = following if isinstance(following, EpochPlan) else self._plan(epoch + 1, following, lost)
            if self.gently and not lost:
                until_ready = time.monotonic() + 30
                while not all(self._word(number, READY_WORD) for number in (*members, *plan.members)):
                    assert time.monotonic() < until_ready, "the ranks do not leave their mesh"
                    time.sleep(0.002)
            reported = self._reported()
            epoch, members = epoch + 1, plan.members
            spares = [number for number in spares if number not in members]
            for folder in shared.iterdir():
                publish_plan(folder, replace(plan, seen=seen))
        for folder in shared.iterdir():
            end_plans(folder)
        wait_for = time.monotonic() + 30
        for process in self._processes.values():
            process.join(max(0.0, wait_for - time.monotonic()))

    def _plan(self, epoch: int, members: tuple[int, ...], lost: set[int]) -> EpochPlan:
        line = f"numbers {sorted(lost)} were killed" if lost else "made anew"
        layout = self.layouts.get(len(members), f"dp={len(members) // self.cfg.parallel.model_ranks}")
        layout = layout if len(members) != world_of(self.cfg) else ""
        return EpochPlan(epoch, members, tuple(sorted(lost)), line, rung="spare", layout=layout)

    def _reported(self) -> int:
        """Steps that the job has reported."""
        path = Path(self.cfg.runs_dir) / self.cfg.name / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _next(self, members: tuple[int, ...], lost: set[int], spares: list[int]) -> tuple[int, ...] | EpochPlan | None:
        if self.plan is not None:
            return self.plan(members, lost, spares)
        free = iter(spares)
        following = [next(free, None) if number in lost else number for number in members]
        return tuple(n for n in following if n is not None) if None not in following else None

    def _code(self, number: int) -> int | None:
        self._processes[number].join(5)
        return self._processes[number].exitcode

    def _tell(self, number: int, word: int, epoch: int) -> None:
        with self._words(number) as words:
            words[word] = epoch + 1

    def _word(self, number: int, word: int) -> int:
        with self._words(number) as words:
            return words[word]

    @contextlib.contextmanager
    def _words(self, number: int) -> Iterator[memoryview]:
        """The header of a process's ring."""
        fd = os.open(self._ring(number), os.O_RDWR)
        with mmap.mmap(fd, HEADER_BYTES) as header, memoryview(header).cast("q") as words:
            yield words
        os.close(fd)

    def _ran(self) -> Ran:
        run_dir = Path(self.cfg.runs_dir) / self.cfg.name
        lines = {}
        for name in ("metrics", "events"):
            path = run_dir / f"{name}.jsonl"
            lines[name] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = checkpoints(Path(self.cfg.checkpoint.dir))
        state, about = read_full(found[0][1]) if found else ({}, {})
        codes = {number: process.exitcode or 0 for number, process in self._processes.items()}
        errors = {int(path.name.split(".")[0]): path.read_text() for path in self.folder.glob("*.error")}
        held = {int(path.name.split(".")[0]): json.loads(path.read_text()) for path in self.folder.glob("*.held")}
        taken = {int(path.name.split(".")[0]): json.loads(path.read_text()) for path in self.folder.glob("*.taken")}
        saved = sorted(step for step, _ in found)
        return Ran(codes, lines["metrics"], lines["events"], state, about, saved, errors, held, taken)


def _process(
    number: int, world: int, cfg: Config, logs: Path, shared: Path, port: int, kills: tuple[Kill, ...]
) -> None:
    """One process of a job."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    facts = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": cfg.name,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    env = {key: str(value) for key, value in facts.items()}
    os.environ.update(env)
    with (
        open(logs / f"{number}.log", "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        _killed(kills),
        mock.patch("pentad.trainer.job.run.conclude_run"),  # pictures take longer than these jobs
        _counted(logs / f"{number}.held", logs / f"{number}.taken"),
    ):
        try:
            start = Start.of(os.environ, StopRequest(), given="", failed=lambda failure: None)
            start.membership = Membership(shared, number, world)
            code = run(cfg, start)
        except BaseException:
            (logs / f"{number}.error").write_text(traceback.format_exc())
            code = 1
        file.flush()
        os._exit(code)


@contextlib.contextmanager
def _counted(held: Path, taken: Path) -> Iterator[None]:
    """Notes what the process holds whenever it begins to train, and the bytes that it got whenever it was filled."""
    train, found = Trainer.train, list[list[int]]()
    fill, exchange, tensors = StateRestore.fill, restore.exchange, Snapshot.tensors
    number, nbytes = int(held.stem), list[int]()

    def counting(self: Trainer, *args: Any) -> bool:
        maps = Path("/proc/self/maps").read_text()
        shared = maps.count("memfd:pentad") + maps.count("/snapshot.")
        found.append([len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), shared])
        held.write_text(json.dumps(found))
        return train(self, *args)

    def filling(self: StateRestore, stepper: Stepper) -> None:
        nbytes.append(0)
        fill(self, stepper)
        taken.write_text(json.dumps(nbytes))

    def coming(axis: Axis, out: Any, into: dict[int, list[torch.Tensor]]) -> None:
        exchange(axis, out, into)
        nbytes[-1] += sum(each.nbytes for tensors in into.values() for each in tensors)

    class Read(GlobalTensor):
        def view_of(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
            view = super().view_of(offsets, sizes)
            nbytes[-1] += view.nbytes
            return view

    def reading(self: Snapshot) -> dict[str, GlobalTensor]:
        pieces = tensors.func(self)
        for piece in pieces.values() if self.number != number or self.partner else ():
            piece.__class__ = Read
        return pieces

    with (
        mock.patch.object(Trainer, "train", counting),
        mock.patch.object(StateRestore, "fill", filling),
        mock.patch.object(restore, "exchange", coming),
        mock.patch.object(Snapshot, "tensors", property(reading)),
    ):
        yield


@contextlib.contextmanager
def _killed(kills: tuple[Kill, ...]) -> Iterator[None]:
    """Counts the entries that this process writes, and kills it."""
    enter, leave, turn = Recorder.enter, Recorder.exit, Recorder.turn
    seen: dict[tuple[int, str], int] = {}
    marked: dict[int, None] = {}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def meant(self: Recorder, kind: int) -> bool:
        """Whether it is the entry at whose end the process dies; where it is the one at whose beginning, it does so."""
        name, ends = self.names[kind], False
        for kill in kills:
            if kill.step == self.step and kill.kind in ("", name):
                at = seen[kill.step, kill.kind] = seen.get((kill.step, kill.kind), -1) + 1
                if at == kill.entry and not kill.after:
                    die()
                ends = ends or at == kill.entry
        return ends

    def entering(self: Recorder, kind: int, *args: Any, **given: Any) -> int:
        ends, ticket = meant(self, kind), enter(self, kind, *args, **given)
        marked.update({ticket: None} if ends else {})
        return ticket

    def turning(self: Recorder, ticket: int, kind: int, *args: Any, **given: Any) -> int:
        if ticket in marked:
            die()
        ends, following = meant(self, kind), turn(self, ticket, kind, *args, **given)
        marked.update({following: None} if ends else {})
        return following

    def leaving(self: Recorder, ticket: int, *args: Any, **given: Any) -> None:
        leave(self, ticket, *args, **given)
        if ticket in marked:
            die()

    if kills:
        Recorder.enter, Recorder.exit, Recorder.turn = entering, leaving, turning  # type: ignore[method-assign]
    yield
