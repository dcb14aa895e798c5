"""What offload costs and saves where copies take their time: a copy engine with a set bandwidth, emulated by waiting.

    python benchmarks/offload_waiting.py --steps 30

Four ranks whose passes sleep for their time (as in `pipeline_waiting.py`) and keep a tensor each, whose copies to the
host and back take bytes / bandwidth. Everything else is real: program, checks, runtime, hooks, lanes, slabs, record.
The bandwidth is set by k = (time of both copies) / (time of F + B + W), as in research on PipeOffload: at most 1 where
copies can be hidden at all. Steps with and without offload alternate; the ratio of their times is the median of all
pairs, with its 95 % interval. The peak is the most bytes that the stages' tensors take on any rank, counted at every
operation of one more step of each, and, for comparison, the simulator's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from sleeping import sleep_backward
from torch import Tensor

from pentad.configs.load import load
from pentad.configs.schema import Config
from pentad.parallel.comm.collectives import all_reduce
from pentad.parallel.comm.lane import Lane, Pending
from pentad.parallel.gradients import WeightGradients
from pentad.parallel.pipeline.execute import execute
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.memory import ActivationBytes, peak_activations
from pentad.parallel.pipeline.offload import offload, selective, windows
from pentad.parallel.pipeline.program import Program
from pentad.parallel.pipeline.runtime import Hidden, Runtime
from pentad.parallel.pipeline.saved import Offloads
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.record.ring import Recorder
from pentad.trainer.metrics.live_bytes import LiveBytes
from pentad.trainer.session import Here, Session

RANKS = 4
CASES = [("gis", 2, 0.5), ("gis", 2, 1.0), ("gis", 4, 1.0), ("po-h", 4, 1.0), ("v-half", 2, 1.0)]
"""Schedule, stages per rank, k."""

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One case.

    Args:
        schedule, chunks, microbatches: of the program.
        k: time of both copies of an activation over the time of its passes.
        pass_s: seconds of each of F, B and W of a rank's whole share of a microbatch.
        kept: bytes that a stage keeps of a microbatch.
        steps: pairs of steps.
        one_engine: copies in both directions share one engine.
    """

    schedule: str
    chunks: int
    k: float
    microbatches: int = 8
    pass_s: float = 0.04
    kept: int = 1 << 20
    steps: int = 30
    one_engine: bool = False

    @property
    def times(self) -> Times:
        """Of a stage's passes and copies, in seconds."""
        each = self.pass_s / self.chunks
        copy = 1.5 * self.k * each
        return Times(
            forward=(each,),
            backward=(each,),
            weight=(each,),
            hop=0.002,
            offload=(copy,),
            reload=(copy,),
            one_engine=self.one_engine,
        )


@dataclass(frozen=True)
class Found:
    """What a case showed.

    Args:
        seconds: of each pair of steps without and with offload.
        share: of all activations, those that are offloaded.
        planned: the simulator's ratio of both steps.
        peaks: bytes without and with offload, of the rank that has most.
        planned_peaks: the simulator's, in microbatches of a rank's whole share.
    """

    seconds: list[tuple[float, float]]
    share: float
    planned: float
    peaks: tuple[int, int]
    planned_peaks: tuple[float, float]

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Step time with offload over that without: the median of all pairs and its 95 % interval."""
        return median_interval([moved / plain for plain, moved in self.seconds])


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and the order statistics that enclose the true one with at least 95 %, whatever the distribution."""
    ordered, n = sorted(values), len(values)
    below, chance, rank = 0.0, 0.5**n, 0
    while below + chance <= 0.025:
        below, rank = below + chance, rank + 1
        chance *= (n - rank + 1) / rank
    low = max(rank - 1, 0)
    return median(ordered), ordered[low], ordered[n - 1 - low]


class _Pass(torch.autograd.Function):
    """The identity, which takes its time and keeps so many bytes."""

    @staticmethod
    def forward(ctx, x: Tensor, store: WeightGradients, seconds: float, kept: int) -> Tensor:
        ctx.store, ctx.seconds = store, seconds
        ctx.save_for_backward(torch.full((kept // 4,), 1.0))
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        if float(kept[-1]) != 1.0:
            raise RuntimeError("an activation did not come back as it was")
        sleep_backward(ctx.store, grad_s=ctx.seconds, weight_s=ctx.seconds)
        return grad, None, None, None


class EmulatedEngine(Lane):
    """A lane whose jobs take at least so many seconds each, as copies of so many bytes at a bandwidth."""

    def __init__(self, name: str, seconds: float, **given: Any) -> None:
        super().__init__(name, "cpu", **given)
        self._seconds = seconds

    def submit(self, job: Callable[[], T]) -> Pending[T]:
        """As `Lane.submit`."""

        def slow() -> T:
            until = time.monotonic() + self._seconds
            result = job()
            time.sleep(max(until - time.monotonic(), 0.0))
            return result

        return super().submit(slow)


class Bench:
    """One rank of a case.

    Args:
        setting: the case.
        store: where the ranks meet, of this case alone.
        rank: this process.
        folder: where the records go.
    """

    def __init__(self, setting: Setting, store: dist.Store, rank: int, folder: Path | None) -> None:
        self.setting, self.rank = setting, rank
        recorder = Recorder(None if folder is None else folder / f"rank-{rank}.ring", rank=rank, world=RANKS)
        here = Here(rank, store, torch.device("cpu"), recorder)
        self.session = Session.open(make_config(setting), range(RANKS), 0, here=here, trains=False)
        self.mesh, self.parts = self.session.mesh, self.session.parts
        self.anchor = torch.zeros(1, 4, requires_grad=True)
        times = setting.times
        plain = lower(
            generate(setting.schedule, ranks=RANKS, microbatches=setting.microbatches, chunks=setting.chunks),
            times=times,
        )
        self.chosen = selective(plain, times, ActivationBytes(activation=(float(setting.kept),)))
        self.programs = plain, offload(plain, self.chosen, times)
        copy = times.offload[0]
        out = EmulatedEngine("to the host", copy, abort=self.mesh.abort, recorder=recorder)
        back = out if setting.one_engine else EmulatedEngine("to the device", copy, abort=self.mesh.abort)
        self.lanes = {out, back}
        self.offloads = Offloads(self.programs[1], rank, out=out, back=back, device=torch.device("cpu"))
        self.runtimes = self._runtime(plain, None), self._runtime(self.programs[1], self.offloads)

    def _runtime(self, program: Program, offloads: Offloads | None) -> Runtime:
        return Runtime(
            program,
            self.rank,
            forward=self._forward,
            hidden=Hidden((1, 4), torch.float32, torch.device("cpu")),
            channel=self.mesh.channel,
            stores=self.parts.stores,
            vocab=None,
            recorder=self.mesh.recorder,
            offloads=offloads,
        )

    def _forward(self, stage: int, index: int, x: Tensor | None) -> Tensor:
        seconds = self.setting.times.forward[0]
        y = _Pass.apply(self.anchor if x is None else x, self.parts.stores[stage], seconds, self.setting.kept)
        assert isinstance(y, Tensor)
        return y.sum() if stage == len(self.parts.pipeline.placement) - 1 else y

    def _largest(self, value: float) -> float:
        return float(all_reduce(torch.tensor([value], dtype=torch.float64), self.mesh.axis("world"), "max").wait())

    def step(self, which: int, count: Callable[[], int] | None = None) -> float:
        """Seconds of a step of the program without (0) or with (1) offload, to the end of the last rank."""
        runtime, program = self.runtimes[which], self.programs[which]
        self.parts.replicas.start_step(program.microbatches)
        begun = self._largest(time.monotonic())
        execute(program.ranks[self.rank], runtime.handlers, self.mesh.recorder, count)
        runtime.finish()
        runtime.losses()
        return self._largest(time.monotonic()) - begun

    def peak(self, which: int) -> int:
        """The most bytes of the stages' tensors on any rank in a step."""
        live, seen = LiveBytes(torch.device("cpu")), [0]

        def count() -> int:
            seen.append(live.count())
            return seen[-1]

        with live.watching():
            self.step(which, count)
        return int(self._largest(max(seen)))

    def run(self) -> Found:
        """Alternating steps, and one more of each that is counted."""
        for which in (0, 1):
            self.step(which)  # makes what is made once
        seconds = []
        for pair in range(self.setting.steps):
            order = (0, 1) if pair % 2 == 0 else (1, 0)
            took = {which: self.step(which) for which in order}
            seconds.append((took[0], took[1]))
        peaks = self.peak(0), self.peak(1)
        plain, moved = (simulate(program, self.setting.times).makespan for program in self.programs)
        total = sum(len(mine) for mine in windows(self.programs[0], self.setting.times))
        planned = max(peak_activations(self.programs[0])), max(peak_activations(self.programs[1]))
        return Found(seconds, len(self.chosen) / total, moved / plain, peaks, planned)

    def close(self) -> None:
        """Leaves the other ranks."""
        self._largest(0.0)
        for lane in self.lanes:
            lane.close()
        self.offloads.close()
        self.session.close()


def make_config(setting: Setting) -> Config:
    """A tiny job with the stages of a case."""
    settings = {
        "model.family": "llama",
        "model.layers": RANKS * setting.chunks,
        "model.hidden": 32,
        "model.heads": 4,
        "model.kv_heads": 4,
        "model.ffn": 64,
        "model.vocab": 320,
        "parallel.pp": RANKS,
        "parallel.dp": 1,
        "parallel.pipeline.schedule": setting.schedule,
        "parallel.pipeline.chunks": setting.chunks,
        "train.steps": 1,
        "train.global_batch": 1,
        "train.micro_batch": 1,
        "train.seq_len": 16,
        "train.dtype": "fp32",
        "train.device": "cpu",
        "data.name": "stdlib",
    }
    return load(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()], world_size=RANKS)


def measure(rank: int, setting: Setting, store: dist.Store, folder: Path | None = None) -> Found:
    """One case on one rank; all ranks return the same but for the clock's last digits."""
    bench = Bench(setting, store, rank, folder)
    try:
        return bench.run()
    finally:
        bench.close()


def row(setting: Setting, found: Found) -> str:
    """A row of the table."""
    ratio, low, high = found.ratio
    (before, after), (plan_before, plan_after) = found.peaks, found.planned_peaks
    seconds = median(plain for plain, _ in found.seconds)
    return (
        f"| {setting.schedule}, {setting.chunks} chunks | {setting.k:g} | {seconds:.3f} "
        f"| {ratio:.4f} ({low:.4f}–{high:.4f}) | {found.planned:.4f} | {found.share:.2f} "
        f"| {1 - after / before:.2f} | {1 - plan_after / plan_before:.2f} |"
    )


def worker(rank: int, folder: Path, arguments: argparse.Namespace) -> None:
    """One rank of all cases, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    if rank == 0:
        print("| program | k | s a step | time with ÷ without (95 %) | simulated | share | peak falls by | simulated |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
    for number, (schedule, chunks, k) in enumerate(CASES):
        setting = Setting(schedule, chunks, k, steps=arguments.steps, one_engine=arguments.one_engine)
        found = measure(rank, setting, dist.PrefixStore(str(number), store))
        if rank == 0:
            print(row(setting, found), flush=True)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps")
    parser.add_argument("--one-engine", action="store_true", help="copies in both directions share one engine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (Path(folder), arguments), nprocs=RANKS)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
