"""One process of Pentad's side of `pipeline.py`, and what both sides share: the job, its batches, and the measuring.

Both sides run Pentad's layers, head, gradient buckets and optimizer; they differ in who runs the pipeline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from workload import Workload, peak_rss_mib, random_batch

from pentad.configs.load import load
from pentad.configs.schema import Config
from pentad.parallel.comm.collectives import Handle
from pentad.parallel.pipeline import runtime, schedules
from pentad.parallel.pipeline.execute import execute
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.program import Program
from pentad.parallel.record.ring import Recorder
from pentad.trainer.data.dataset import Microbatch
from pentad.trainer.processes.meeting import Meeting
from pentad.trainer.session import Here, MakeStepper, Session
from pentad.trainer.setup import Ranks
from pentad.trainer.step import Stepper

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
"""Stages per process of the schedules that both sides have."""


@dataclass
class Report:
    """What one process reports."""

    step_s: list[float] = field(default_factory=list)
    """Seconds of each step after the warm-up."""
    losses: list[float] = field(default_factory=list)
    """Of every step, the warm-up's included."""
    rss_mib: float = 0.0
    libraries_mib: float = 0.0
    """Peak resident memory right after the imports."""
    live: dict[str, int] = field(default_factory=dict)
    """Most tensors alive at a time: inputs and grads (receive buffers), outputs. Empty unless watched."""
    overhead_us: float = 0.0
    """Empty stages: per operation, beyond the operation."""
    operation_us: float = 0.0
    """Empty stages: per operation, without waiting."""


class Watch:
    """Counts how many of the tensors that went by are still alive."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._alive: dict[str, set[StorageWeakRef]] = {}

    def see(self, kind: str, tensor: Tensor) -> None:
        """`tensor` exists now."""
        alive = self._alive.setdefault(kind, set())
        alive.add(StorageWeakRef(tensor.untyped_storage()))
        for each, tensors in self._alive.items():
            self._alive[each] = {ref for ref in tensors if not ref.expired()}
            self.peaks[each] = max(self.peaks.get(each, 0), len(self._alive[each]))

    def stage(self, x: Tensor | None, y: Tensor | None) -> None:
        """A stage made y (none: the last stage) from x (none: the first stage)."""
        if x is not None:
            self.see("inputs", x)
        if y is not None:
            self.see("outputs", y)
            y.register_hook(lambda grad: self.see("grads", grad))


def worker_arguments() -> argparse.Namespace:
    """Arguments that `pipeline.py` gives to every process of either side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule", choices=CHUNKS, required=True)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--watch", action="store_true", help="count live tensors")
    parser.add_argument("--empty", action="store_true", help="measure the overhead of empty stages instead")
    parser.add_argument("--out", type=Path, required=True, help="folder for rank-N.json and rank-N.ring")
    return parser.parse_args()


def make_config(arguments: argparse.Namespace, processes: int) -> Config:
    """The job: the workload's model, microbatches of one sequence."""
    work = Workload()
    model = {name: getattr(work, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    sections: dict[str, dict[str, Any]] = {
        "model": {"family": "llama", "tied": False, **model},
        "parallel": {"pp": processes, "dp": 1},
        "parallel.pipeline": {"schedule": arguments.schedule, "chunks": CHUNKS[arguments.schedule]},
        "train": {
            "steps": arguments.warmup + arguments.steps,
            "global_batch": arguments.microbatches,
            "micro_batch": 1,
            "seq_len": work.seq_len,
            "dtype": arguments.dtype,
            "device": "cpu",
        },
        "optim": {"name": "adamw", "lr": work.lr, "clip": work.clip, "weight_decay": work.weight_decay},
        "optim.schedule": {"name": "constant"},
        "data": {"name": "stdlib"},
    }
    overrides = [
        f"{section}.{key}={json.dumps(value)}" for section, keys in sections.items() for key, value in keys.items()
    ]
    return load(None, overrides, world_size=processes)


def batches_of(step: int, count: int) -> list[Microbatch]:
    """`count` microbatches of one sequence of random tokens."""
    tokens = random_batch(replace(Workload(), global_batch=count), step)
    labels = tokens.roll(-1, dims=1)
    sequences = torch.arange(count)
    return [
        Microbatch(tokens[i : i + 1], labels[i : i + 1], None, None, sequences[i : i + 1], tokens.shape[1], 0)
        for i in range(count)
    ]


@dataclass(frozen=True)
class Setup:
    """A process that is ready to train."""

    arguments: argparse.Namespace
    cfg: Config
    session: Session
    libraries_mib: float
    watch: Watch | None

    @staticmethod
    def of(arguments: argparse.Namespace, watch: Watch | None = None, stepper: MakeStepper = Stepper) -> Setup:
        """Meets the other processes, then builds this one's part of the model and what trains it."""
        libraries = peak_rss_mib()
        # Random logits give denormal softmax gradients, which slow x86 GEMMs down many times; so does the trainer.
        torch.set_flush_denormal(True)
        ranks = Ranks.from_environment()
        cfg = make_config(arguments, ranks.world)
        recorder = Recorder(arguments.out / f"rank-{ranks.rank}.ring", rank=ranks.rank, world=ranks.world)
        store = Meeting(ranks.rank, ranks.world).open(cfg.faults.timeout_s)
        here = Here(ranks.rank, store, torch.device("cpu"), recorder)
        session = Session.open(cfg, range(ranks.world), 0, here=here, stepper=stepper)
        return Setup(arguments, cfg, session, libraries, watch)

    def measure(self) -> None:
        """Trains, and writes the report."""
        report, warmup, count = Report(), self.arguments.warmup, self.arguments.microbatches
        stepper = self.session.stepper
        for step in range(warmup + self.arguments.steps):
            batches = batches_of(step, count)
            start = time.perf_counter()
            result = stepper.run(step, batches, sum(batch.valid for batch in batches), self.cfg.optim.lr)
            report.losses.append(float(result.loss))
            if step >= warmup:
                report.step_s.append(time.perf_counter() - start)
        report.rss_mib, report.libraries_mib = peak_rss_mib(), self.libraries_mib
        report.live = self.watch.peaks if self.watch else {}
        self.finish(report, self.session.program)

    def finish(self, report: Report, program: Program) -> None:
        """Writes what `pipeline.py` reads, and leaves the other processes."""
        out, mesh = self.arguments.out, self.session.mesh
        (out / f"rank-{mesh.rank}.json").write_text(json.dumps(asdict(report)))
        if mesh.is_first:
            (out / "program.json").write_text(program.to_json())
        self.session.close()


class WatchedStepper(Stepper):
    """Shows every stage's input and output to a watch."""

    def __init__(self, watch: Watch, *given: Any) -> None:
        super().__init__(*given)
        self.watch = watch

    def _forward(self, stage: int, index: int, x: Tensor | None) -> Tensor:
        y = super()._forward(stage, index, x)
        self.watch.stage(x, y if y.dim() else None)
        return y


def train(arguments: argparse.Namespace) -> None:
    """Pentad's runtime."""
    if not arguments.watch:
        return Setup.of(arguments).measure()
    watch = Watch()
    return Setup.of(arguments, watch, partial(WatchedStepper, watch)).measure()


class Stopwatch:
    """Adds up the time inside some functions; a call inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, its time added."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return timed


def empty_stages(arguments: argparse.Namespace) -> None:
    """The pipeline without its layers: each stage's output is a view of its input, one number.

    What is left of a step without forward, backward, sends, receives and waits is the interpreter's and the runtime's
    own time: dispatch, record, and keeping of inputs, outputs, graphs and buffers.
    """
    setup = Setup.of(arguments)
    mesh, name = setup.session.mesh, arguments.schedule
    compute = schedules.generate(name, ranks=mesh.degrees.pp, microbatches=arguments.microbatches, chunks=CHUNKS[name])
    program = lower(compute)
    anchor, last = torch.zeros(1, 1, requires_grad=True), program.stages - 1

    def forward(stage: int, index: int, x: Tensor | None) -> Tensor:
        y = anchor if x is None else x
        return y.view(()) if stage == last else y.view(1, 1)

    operation, waiting, totals = Stopwatch(), Stopwatch(), []
    ours = runtime.Runtime(
        program,
        mesh.rank,
        forward=operation.around(forward),
        hidden=runtime.Hidden((1, 1), torch.float32, torch.device("cpu")),
        channel=mesh.channel,
        stores={},
        vocab=None,
        recorder=mesh.recorder,
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(runtime, "send", operation.around(runtime.send)))
        stack.enter_context(patch.object(runtime, "receive", operation.around(runtime.receive)))
        stack.enter_context(patch.object(torch.autograd, "backward", operation.around(torch.autograd.backward)))
        stack.enter_context(patch.object(Handle, "wait", waiting.around(Handle.wait)))
        for _ in range(arguments.warmup + arguments.steps):
            operation.seconds = waiting.seconds = 0.0
            start = time.perf_counter()
            execute(program.ranks[mesh.rank], ours.handlers, mesh.recorder)
            ours.finish()
            elapsed = time.perf_counter() - start
            ours.losses()
            totals.append((elapsed - waiting.seconds, elapsed - waiting.seconds - operation.seconds))
    count = len(program.ranks[mesh.rank])
    whole, own = (statistics.median(each) / count * 1e6 for each in zip(*totals[arguments.warmup :], strict=True))
    setup.finish(Report(operation_us=whole, overhead_us=own), program)


if __name__ == "__main__":
    given = worker_arguments()
    empty_stages(given) if given.empty else train(given)
