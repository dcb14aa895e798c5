"""How well the simulator predicts the executor: 8 ranks whose computation is waiting, so that they run side by side.

    python benchmarks/pipeline_waiting.py --microbatches 16

Everything but the computation is real: mesh, channels, lanes, runtime, program, record, and the collectives of the
balanced vocabulary, on tiny tensors. A forward pass, either part of a backward pass and the passes of the vocabulary
sleep for their time instead. The latencies of a hop and of a collective are measured beforehand in the same processes:
among ranks that have waited for as long as they do in a step. Two cores are enough.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from sleeping import sleep_backward
from torch import Tensor

from pentad.configs.load import load
from pentad.configs.schema import Config
from pentad.models.sequences import Inputs
from pentad.parallel.comm.collectives import all_reduce, receive, send
from pentad.parallel.gradients import WeightGradients
from pentad.parallel.pipeline import draw, schedules
from pentad.parallel.pipeline.execute import Handler, execute
from pentad.parallel.pipeline.kind import Kind
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.recorded import actual
from pentad.parallel.pipeline.runtime import Hidden, Runtime
from pentad.parallel.pipeline.simulate import Timeline, simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced
from pentad.parallel.record.reader import read
from pentad.parallel.record.ring import Recorder
from pentad.trainer.pipeline.vocab_passes import BalancedVocabulary
from pentad.trainer.session import Here, Session

RANKS = 8
CASES = [(name, chunks, vocab) for name, chunks in (("1f1b", 1), ("gis", 2), ("v-half", 2)) for vocab in (False, True)]
"""Schedule, stages per rank, vocabulary balanced."""
WAITS = Times(
    forward=(0.12,),
    backward=(0.13,),
    weight=(0.11,),
    head=(0.12,),
    head_grad=(0.1,),
    embed=(0.1,),
    embed_grad=(0.1,),
)
"""Seconds per stage, and per rank for the vocabulary."""
PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"


class _Sleep(torch.autograd.Function):
    """The identity, which takes its time; the part of its backward that is W waits in the store where it is split."""

    @staticmethod
    def forward(ctx, x: Tensor, store: WeightGradients) -> Tensor:
        ctx.store = store
        time.sleep(WAITS.forward[0])
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        sleep_backward(ctx.store, grad_s=WAITS.backward[0], weight_s=WAITS.weight[0])
        return grad, None


def slowed(handlers: dict[Kind, Handler]) -> dict[Kind, Handler]:
    """The same, but the passes of the vocabulary take their time, after their data is there."""
    passes = {
        Kinds.HEAD: WAITS.head,
        Kinds.HEAD_GRAD: WAITS.head_grad,
        Kinds.EMBED: WAITS.embed,
        Kinds.EMBED_GRAD: WAITS.embed_grad,
    }
    slow = {kind: _then_sleep(handlers[kind], seconds) for kind, (seconds,) in passes.items() if kind in handlers}
    return handlers | slow


def _then_sleep(run: Handler, seconds: float) -> Handler:
    def slow(op: Op) -> None:
        run(op)
        time.sleep(seconds)

    return slow


def make_config(name: str, chunks: int, vocab: bool) -> Config:
    """A tiny job of 8 pipeline ranks."""
    settings = {
        "model.family": "llama",
        "model.layers": RANKS * chunks,
        "model.hidden": 32,
        "model.heads": 4,
        "model.kv_heads": 4,
        "model.ffn": 64,
        "model.vocab": 320,
        "parallel.pp": RANKS,
        "parallel.dp": 1,
        "parallel.pipeline.schedule": name,
        "parallel.pipeline.chunks": chunks,
        "parallel.pipeline.vocab": "balanced" if vocab else "ends",
        "train.steps": 1,
        "train.global_batch": 1,
        "train.micro_batch": 1,
        "train.seq_len": 16,
        "train.dtype": "fp32",
        "train.device": "cpu",
        "data.name": "stdlib",
    }
    return load(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()], world_size=RANKS)


class Case:
    """One schedule on one rank.

    Args:
        cfg: the job.
        store: where the ranks meet, of this case alone.
        rank: this process.
        folder: where the records go.
    """

    def __init__(self, cfg: Config, store: dist.Store, rank: int, folder: Path) -> None:
        self.cfg, self.store, self.rank, self.folder = cfg, store, rank, folder
        recorder = Recorder(folder / f"rank-{rank}.ring", rank=rank, world=RANKS)
        here = Here(rank, store, torch.device("cpu"), recorder)
        self.session = Session.open(cfg, range(RANKS), 0, here=here, trains=False)
        self.mesh, self.parts = self.session.mesh, self.session.parts
        self.shape = (cfg.train.seq_len, cfg.model.hidden)
        self.anchor = torch.zeros(self.shape, requires_grad=True)
        self.vocab: BalancedVocabulary | None = None
        if self.parts.pipeline.split.balanced:
            tokens = torch.zeros(1, cfg.train.seq_len, dtype=torch.long)
            inputs = Inputs(tokens, tokens, 1.0)
            barriers = cfg.parallel.pipeline.vocab_barriers
            self.vocab = BalancedVocabulary(self.parts, self.mesh, barriers, torch.float32, lambda index: inputs)

    def close(self) -> None:
        """Leaves the other ranks."""
        self.together()
        if self.vocab is not None:
            self.vocab.close()
        self.session.close()

    def together(self) -> None:
        """Returns on all ranks at about the same time."""
        all_reduce(torch.zeros(1), self.mesh.axis("world")).wait()

    def latest(self, at: float) -> float:
        """The largest of the ranks' times, all of one clock."""
        return float(all_reduce(torch.tensor([at], dtype=torch.float64), self.mesh.axis("world"), "max").wait())

    def hop(self, times: int = 8) -> float:
        """Median seconds from a send to its arrival at a rank that waits for it."""
        found = []
        pairs = pairwise(self.parts.pipeline.placement)
        source, to = next((a, b) for a, b in pairs if a != b)
        for _ in range(times):
            self.together()
            arrived = sent = 0.0
            if self.rank == to:
                receive(torch.empty(self.shape), self.mesh.channel(source, to), 0).wait()
                arrived = time.monotonic()
            elif self.rank == source:
                time.sleep(WAITS.forward[0])
                sent = time.monotonic()
                handle = send(torch.zeros(self.shape), self.mesh.channel(source, to), 1)
                handle.wait()
            found.append(self.latest(arrived) - self.latest(sent))
        return median(found)

    def collective(self, times: int = 4) -> float:
        """Median seconds from the last rank's start of a collective of the vocabulary to its end on all ranks."""
        if self.vocab is None:
            return 0.0
        self.parts.replicas.start_step(times)
        found, zeros = [], torch.zeros(self.shape)
        first, last = (self.rank == end for end in self.parts.pipeline.ends)
        run = self.vocab.handlers(
            output=lambda index: zeros if last else None, rows_grad=lambda index: zeros if first else None
        )
        for i in range(times):
            vocab, head, embed = self.vocab, Op(Kinds.HEAD, i), Op(Kinds.EMBED, i)
            run[Kinds.EMBED](embed)
            found.append(self._timed(partial(run[Kinds.EMBEDDED], embed), partial(vocab.rows, i) if first else None))
            found.append(self._timed(partial(run[Kinds.HIDDEN], head), partial(run[Kinds.HEAD], head)))
            found.append(self._timed(partial(run[Kinds.STATISTICS], head), partial(run[Kinds.HEAD_GRAD], head)))
            if last:
                vocab.hidden_grad(i)
            vocab.loss(i)
            found.append(self._timed(partial(run[Kinds.EMBEDDED_GRAD], embed), partial(run[Kinds.EMBED_GRAD], embed)))
        return median(found)

    def _timed(self, post: Callable[[], object], wait: Callable[[], object] | None) -> float:
        """Seconds from the last rank's `post` to the end of the last rank's `wait`, all having slept before."""
        self.together()
        time.sleep(WAITS.head[0])
        started = time.monotonic()
        post()
        if wait is not None:
            wait()
        ended = time.monotonic()
        return self.latest(ended) - self.latest(started)

    def program(self, microbatches: int, times: Times) -> Program:
        """The same on all ranks: made by the first one."""
        if self.rank == 0:
            pipeline = self.cfg.parallel.pipeline
            name, chunks = pipeline.schedule, pipeline.chunks
            options: dict[str, Any] = {"ranks": RANKS, "microbatches": microbatches, "chunks": chunks}
            if self.vocab is None:
                compute = schedules.generate(name, **options)
            else:
                compute = balanced(name, **options, times=times)
            self.store.set("program", lower(compute, times=times).to_json())
        return Program.from_json(self.store.get("program").decode())

    def run(self, program: Program, steps: int) -> None:
        """Runs the program; the record says when each operation ran."""
        ours = Runtime(
            program,
            self.rank,
            forward=self._forward,
            hidden=Hidden(self.shape, torch.float32, torch.device("cpu")),
            channel=self.mesh.channel,
            stores=self.parts.stores,
            vocab=self.vocab,
            recorder=self.mesh.recorder,
        )
        handlers = slowed(ours.handlers)
        for step in range(steps):
            self.mesh.recorder.step = step + 1  # 0: what was measured before
            self.together()
            self.parts.replicas.start_step(program.microbatches)
            execute(program.ranks[self.rank], handlers, self.mesh.recorder)
            ours.finish()
            ours.losses()

    def _forward(self, stage: int, index: int, x: Tensor | None) -> Tensor:
        y = _Sleep.apply(self.anchor if x is None else x, self.parts.stores[stage])
        assert isinstance(y, Tensor)
        ends_here = stage == len(self.parts.pipeline.placement) - 1 and self.vocab is None
        return y.sum() if ends_here else y

    def real(self, program: Program, step: int) -> Timeline:
        """What all ranks did in a step; call when all have finished."""
        return actual(program, [read(self.folder / f"rank-{rank}.ring") for rank in range(RANKS)], step)


def run_case(case: Case, arguments: argparse.Namespace, label: str) -> None:
    """Measures, simulates, runs and, on the first rank, prints."""
    hop, collective = case.hop(), case.collective()
    times = replace(WAITS, hop=hop, collective=collective)
    if case.vocab is None:
        times = replace(times, head=(0.0,), head_grad=(0.0,), embed=(0.0,), embed_grad=(0.0,))
    program = case.program(arguments.microbatches, times)
    case.run(program, arguments.steps)
    case.together()
    if case.rank:
        return
    plan = simulate(program, times)
    reals = [case.real(program, step + 1) for step in range(arguments.steps)]
    real = median(each.makespan for each in reals)
    print(
        f"| {label} | {real:.3f} | {plan.makespan:.3f} | {real / plan.makespan:.4f} "
        f"| {hop * 1e3:.2f} | {collective * 1e3:.2f} |",
        flush=True,
    )
    if arguments.picture == label:
        file = PICTURES / f"plan-and-actual-{label.replace(' ', '-')}.svg"
        file.write_text(draw.svg(plan, actual=reals[-1], unit="s", title=f"{label}: planned above real"))


def worker(rank: int, folder: Path, arguments: argparse.Namespace) -> None:
    """One rank of all cases, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    if rank == 0:
        print("| case | real s | simulated s | real ÷ simulated | hop ms | collective ms |\n|---|---|---|---|---|---|")
    for name, chunks, vocab in CASES:
        label = f"{name} balanced" if vocab else name
        if arguments.only and label not in arguments.only:
            continue
        own = folder / label.replace(" ", "-")
        case = Case(make_config(name, chunks, vocab), dist.PrefixStore(label, store), rank, own)
        run_case(case, arguments, label)
        case.close()


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--only", nargs="*", help='cases, as in the table: 1f1b "1f1b balanced" …')
    parser.add_argument("--picture", metavar="CASE", help="draw this case into docs/pictures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (Path(folder), arguments), nprocs=RANKS)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
