"""One training step: the handlers of the program's operations.

Nothing here asks the device for a number. Loss, gradient norm and the decision to skip are tensors on the device; the
loop reads them after the step was issued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configs.schema import Config
from ..models.dropout import Draws
from ..models.transformer import Transformer
from ..parallel.collectives import all_reduce
from ..parallel.data import Replicas
from ..parallel.mesh import Mesh
from ..parallel.pipeline.execute import Handler, execute
from ..parallel.pipeline.program import Kind, Op, Program
from .data.dataset import MicroBatch
from .optimizer import Optimizer


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device."""

    loss: Tensor
    """Mean loss over all valid tokens of the global batch."""
    grad_norm: Tensor
    """Global norm of the gradient, before clipping."""
    skipped: Tensor
    """1 where the gradient was not finite and nothing was updated."""
    stop: Tensor
    """Number of ranks that were asked to stop: all ranks see the same number after the same step."""


class Stepper:
    """Runs the program of one rank.

    Args:
        cfg: the job.
        model: this rank's part of the model.
        replicas: its data parallelism.
        optimizer: its optimizer, states prepared.
        mesh: the mesh.
        program: what a step does; this rank's operations are those of its place on the pipeline axis.
    """

    def __init__(
        self, cfg: Config, model: Transformer, replicas: Replicas, optimizer: Optimizer, mesh: Mesh, program: Program
    ) -> None:
        self.cfg, self.model, self.replicas, self.optimizer, self.mesh = cfg, model, replicas, optimizer, mesh
        self.ops = program.ranks[mesh.axis("pp").rank]
        self.microbatches = program.microbatches
        self.device = next(model.parameters()).device
        precise = torch.float64 if cfg.train.dtype == "fp64" else torch.float32
        self.updates = torch.zeros((), dtype=torch.float32, device=self.device)
        """Updates applied so far; skipped steps do not count."""
        self._zero = torch.zeros((), dtype=precise, device=self.device)
        self._handlers: dict[Kind, Handler] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.REDUCE: lambda op: self.replicas.reduce(op.index),
            Kind.NORM: self._norm,
            Kind.OPTIMIZE: self._optimize,
            Kind.GATHER: lambda op: self.replicas.gather(op.index),
        }

    def run(self, step: int, batches: Sequence[MicroBatch], valid: int, lr: float, *, stop: bool = False) -> StepResult:
        """Trains on this rank's micro-batches.

        Args:
            step: 0-based.
            batches: one per micro-batch of the program.
            valid: valid tokens of the whole global batch.
            lr: learning rate.
            stop: whether this rank was asked to stop; the ranks agree inside the step.
        """
        self._stop = torch.full_like(self._zero, float(stop))
        self._step, self._batches, self._lr = step, batches, lr
        self._scale = 1.0 / max(valid, 1)
        self._losses: dict[int, Tensor] = {}
        self._loss = self._zero
        self.mesh.recorder.step = step
        self.replicas.start_step()
        execute(self.ops, self._handlers, self.mesh.recorder)
        return StepResult(self._loss, self._grad_norm, self._skip, self._stop)

    def loss(self, batch: MicroBatch, scale: float, draws: Draws | None = None) -> Tensor:
        """The summed loss of a micro-batch times `scale`."""
        return self.model(
            batch.tokens.to(self.device, non_blocking=True),
            batch.labels.to(self.device, non_blocking=True),
            scale=scale,
            positions=_to(batch.positions, self.device),
            documents=_to(batch.documents, self.device),
            draws=draws,
        )

    def _forward(self, op: Op) -> None:
        self.replicas.begin_micro_batch(last=op.index == self.microbatches - 1)
        batch = self._batches[op.index]
        self._losses[op.index] = self.loss(batch, self._scale, self._draws(batch))

    def _backward(self, op: Op) -> None:
        loss = self._losses.pop(op.index)
        loss.backward()
        self._loss = self._loss + loss.detach()

    def _draws(self, batch: MicroBatch) -> Draws | None:
        if not self.cfg.model.dropout:
            return None
        tp = self.mesh.axis("tp")
        tokens = batch.tokens.numel() // tp.size
        return Draws(
            self.cfg.model.dropout,
            self.cfg.train.seed,
            self._step,
            tuple(batch.samples.tolist()),
            self.cfg.train.seq_len,
            tp.rank * tokens,
            (tp.rank + 1) * tokens,
        )

    def _norm(self, op: Op) -> None:
        """One collective for the norm, the loss and the wish to stop; replicas are counted once."""
        square = self._zero
        for bucket in range(self.replicas.buckets):
            for unit in self.replicas.units(bucket):
                if unit.counted:
                    square = square + torch.linalg.vector_norm(unit.grad).square()
        counted = self._loss if self.mesh.axis("tp").rank == 0 else self._zero
        total = all_reduce(torch.stack((square, counted, self._stop)), self.mesh.axis("world")).wait()
        self._grad_norm, self._loss, self._stop = total[0].sqrt(), total[1], total[2]
        self._skip = (~torch.isfinite(total).all()).float()
        self.updates = self.updates + (1 - self._skip)
        clip = self.cfg.optim.clip
        factor = (clip / (self._grad_norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(self._grad_norm)
        self._factor = torch.where(self._skip.bool(), torch.ones_like(factor), factor)

    def _optimize(self, op: Op) -> None:
        units = self.replicas.units(op.index)
        self.optimizer.step(units, lr=self._lr, factor=self._factor, skip=self._skip, count=self.updates)
        for unit in units:
            if unit.rounded is not None:
                unit.rounded.copy_(unit.value)


def _to(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device, non_blocking=True)
