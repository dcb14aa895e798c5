"""torch.distributed.pipelining's schedules and stages, over Pentad's layers, head, gradient buckets and optimizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pipeline_worker import Setup, Watch, worker_arguments
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from pentad.configs.schema import Config
from pentad.models.sequences import Inputs
from pentad.models.stages import run_stage
from pentad.parallel.comm.mesh import Mesh
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.runtime import Runtime
from pentad.trainer.optim.states import Optimizer
from pentad.trainer.setup import DTYPES, Parts
from pentad.trainer.step import Stepper

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class Stage(nn.Module):
    """The layers of one stage; the head is torch's loss function."""

    def __init__(self, parts: Parts, stage: int, tokens: Tensor, dtype: torch.dtype, watch: Watch | None) -> None:
        super().__init__()
        self.model, self.replicas, self.watch = parts.model, parts.replicas, watch
        self.split = replace(parts.pipeline.split, balanced=True)
        self.stage, self.tokens, self.dtype = stage, tokens, dtype

    def forward(self, x: Tensor) -> Tensor:
        """The tokens (1, T) for the first stage, else the hidden states (T, h) → (T, h)."""
        self.replicas.begin_microbatch()
        tokens, received = self.tokens, x
        if self.stage == 0:
            tokens = x
            x = self.model.embedding_op(tokens.reshape(-1), self.model.embed_weight)
        y = run_stage(self.model, self.split, self.stage, x, Inputs(tokens, tokens, 1.0), self.dtype)
        if self.watch is not None:
            last = self.stage == len(self.split.layers) - 1
            self.watch.stage(received if self.stage else None, None if last else y)
        return y


class TorchStepper(Stepper):
    """A step whose one operation before the update is torch's whole schedule.

    Args:
        arguments, watch: of the benchmark.
        cfg, parts, optimizer, mesh, program: as of any stepper.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        watch: Watch | None,
        cfg: Config,
        parts: Parts,
        optimizer: Optimizer,
        mesh: Mesh,
        program: Program,
    ) -> None:
        updates = (Kinds.REDUCE, Kinds.NORM, Kinds.OPTIMIZE, Kinds.GATHER)
        tails = (tuple(op for op in ops if op.kind in updates) for ops in program.ranks)
        lists = tuple((Op(Kinds.FORWARD, 0, 0), *tail) for tail in tails)
        super().__init__(cfg, parts, optimizer, mesh, Program(1, program.placement, lists))
        self._losses: list[Tensor] = []
        self._runner = make_runner(arguments, watch, cfg, parts, program.stages_of(self.rank))
        self._handlers[Kinds.FORWARD] = self._run_schedule

    def _run_schedule(self, op: Op) -> None:
        tokens, labels = (torch.cat([getattr(b, name) for b in self._now.inputs]) for name in ("tokens", "labels"))
        self._runner(self._losses, tokens, labels)

    def _counted(self, runtime: Runtime) -> Tensor:
        losses = [loss.detach() for loss in self._losses]
        self._losses.clear()
        return torch.stack(losses).sum() if losses else self._zero


def make_runner(
    arguments: argparse.Namespace, watch: Watch | None, cfg: Config, parts: Parts, mine: Sequence[int]
) -> Callable[[list[Tensor], Tensor, Tensor], None]:
    """(list for the losses, tokens (m, T), labels (m, T)) → a step of torch's schedule; `mine`: this rank's stages."""
    count, dtype, placement = arguments.microbatches, DTYPES[cfg.train.dtype], parts.pipeline.placement
    tokens = torch.zeros(1, cfg.train.seq_len, dtype=torch.long)
    # Shapes known beforehand: else torch runs every stage once more in the first step to infer them.
    hidden = torch.empty(cfg.train.seq_len, cfg.model.hidden, dtype=dtype, requires_grad=True)
    stages = [
        PipelineStage(
            Stage(parts, stage, tokens, dtype, watch),
            stage,
            len(placement),
            parts.device,
            input_args=tokens if stage == 0 else hidden,
            output_args=hidden,
        )
        for stage in mine
    ]
    scale = 1.0 / (count * cfg.train.seq_len)

    def loss_of(x: Tensor, labels: Tensor) -> Tensor:
        return parts.model.head_op.loss(x, parts.model.head_weight, labels.reshape(-1), scale)

    schedule: Any = SCHEDULES[arguments.schedule]
    options = {"n_microbatches": count, "loss_fn": loss_of, "scale_grads": False}
    runner = schedule(stages if len(stages) > 1 else stages[0], **options)
    first, last = 0 in mine, len(placement) - 1 in mine

    def run(losses: list[Tensor], tokens: Tensor, labels: Tensor) -> None:
        arguments = (tokens,) if first else ()
        runner.step(*arguments, target=labels if last else None, losses=losses, return_outputs=False)

    return run


def main() -> None:
    """Train and report."""
    arguments = worker_arguments()
    watch = Watch() if arguments.watch else None
    Setup.of(arguments, watch, partial(TorchStepper, arguments, watch)).measure()


if __name__ == "__main__":
    main()
