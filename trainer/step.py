"""One training step: the handlers of the program's operations.

Nothing here asks the device for a number. Loss, gradient norm and the decision to skip are tensors on the device; the
loop reads them after the step was issued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configs.schema import Config
from ..models.parallelize import close
from ..models.routing.balance import collect, rebalance
from ..models.stages import run_stage
from ..parallel.comm.collectives import Handle, all_reduce
from ..parallel.comm.mesh import Mesh
from ..parallel.pipeline.execute import Handler, execute
from ..parallel.pipeline.kind import Kind
from ..parallel.pipeline.needs import Kinds
from ..parallel.pipeline.program import Op, Program
from ..parallel.pipeline.runtime import Hidden, Runtime
from ..parallel.vocab import Look
from .data.dataset import Microbatch
from .inputs import InputMaker
from .optim.optimizer import Optimizer, sum_of_squares
from .setup import DTYPES, Parts
from .vocab_passes import BalancedVocabulary


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
    worst: Handle
    """The largest value over all ranks of each number that `run` was given to watch, fp64."""
    moe: Tensor | None
    """What the routers counted in the step, over all ranks: (mixture-of-experts layers, `balance` columns)."""


class Stepper:
    """Runs the programs of one rank.

    Args:
        cfg: the job.
        parts: this rank's part of the model, its data parallelism, and the pipeline.
        optimizer: its optimizer, states prepared.
        mesh: the mesh.
        program: what a step does; this rank's operations are those of its place on the pipeline axis.
    """

    def __init__(self, cfg: Config, parts: Parts, optimizer: Optimizer, mesh: Mesh, program: Program) -> None:
        self.cfg, self.parts, self.optimizer, self.mesh, self.program = cfg, parts, optimizer, mesh, program
        self.model, self.replicas = parts.model, parts.replicas
        self.rank = mesh.axis("pp").rank
        self.ops = program.ranks[self.rank]
        self.device = parts.device
        self.dtype = DTYPES[cfg.train.dtype]
        precise = torch.float64 if cfg.train.dtype == "fp64" else torch.float32
        self.updates = torch.zeros((), dtype=torch.float32, device=self.device)
        """Updates applied so far; skipped steps do not count."""
        self._zero = torch.zeros((), dtype=precise, device=self.device)
        self._maker = InputMaker(cfg, mesh, parts.device)
        self._vocabulary: BalancedVocabulary | None = None
        if parts.pipeline.split.balanced:
            barriers = cfg.parallel.pipeline.vocab_barriers
            self._vocabulary = BalancedVocabulary(parts, mesh, barriers, self.dtype, lambda index: self._inputs[index])
        self._runtime = self._make_runtime(program)
        self._handlers: dict[Kind, Handler] = self._runtime.handlers | {
            Kinds.REDUCE: lambda op: self.replicas.reduce(op.index),
            Kinds.NORM: self._norm,
            Kinds.OPTIMIZE: self._optimize,
            Kinds.GATHER: lambda op: self.replicas.gather(op.index),
        }
        self._evaluation: tuple[Runtime, Program] | None = None

    def _make_runtime(self, program: Program) -> Runtime:
        train = self.cfg.train
        tokens = train.micro_batch * train.seq_len // self.mesh.axis("tokens").size
        return Runtime(
            program,
            self.rank,
            forward=self._forward,
            hidden=Hidden((tokens, self.cfg.model.hidden), self.dtype, self.device),
            channel=self.mesh.channel,
            stores=self.parts.stores,
            vocab=self._vocabulary,
            recorder=self.mesh.recorder,
        )

    def run(
        self,
        step: int,
        batches: Sequence[Microbatch],
        valid: int,
        lr: float,
        *,
        stop: bool = False,
        watched: Callable[[], Sequence[float]] = tuple,
    ) -> StepResult:
        """Trains on this rank's microbatches.

        Args:
            step: 0-based.
            batches: one per microbatch of the program.
            valid: valid tokens of the whole global batch.
            lr: learning rate.
            stop: whether this rank was asked to stop; the ranks agree inside the step.
            watched: numbers of this rank whose largest over all ranks is wanted, as many on each; asked for after
                the last backward pass.
        """
        self._watched = watched
        self._stop = torch.full_like(self._zero, float(stop))
        self._lr = lr
        self._begin(step, batches, 1.0 / max(valid, 1))
        self.replicas.start_step(len(batches))
        execute(self.ops, self._handlers, self.mesh.recorder)
        return StepResult(self._loss, self._grad_norm, self._skip, self._stop, self._worst, self._routed)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Microbatch], program: Program, look: Look | None = None) -> Tensor:
        """The summed loss of this rank's microbatches; 0 on the ranks that do not count it.

        Args:
            batches: one per microbatch of the program.
            program: forward passes only.
            look: shown the logits, where this rank makes some.
        """
        if self._evaluation is None or self._evaluation[1] is not program:
            self._evaluation = self._make_runtime(program), program
        runtime = self._evaluation[0]
        self._begin(-1, batches, 1.0)
        self._show(look)
        try:
            execute(program.ranks[self.rank], runtime.handlers, self.mesh.recorder)
            runtime.finish()
        finally:
            self._show(None)
        return self._counted(runtime)

    def _show(self, look: Look | None) -> None:
        self.model.head_op.look = look
        if self._vocabulary is not None:
            self._vocabulary.show(look)

    def close(self) -> None:
        """Ends what runs beside the step; call before the mesh is closed."""
        close(self.model)
        if self._vocabulary is not None:
            self._vocabulary.close()

    def _begin(self, step: int, batches: Sequence[Microbatch], scale: float) -> None:
        self._inputs = [self._maker.make(batch, step, scale) for batch in batches]
        if step >= 0:
            self.mesh.recorder.step = step

    def _counted(self, runtime: Runtime) -> Tensor:
        """What this rank adds to the loss: every token's loss enters the global sum once."""
        losses = runtime.losses()
        if not losses or self.mesh.axis("tp").rank or (self.parts.pipeline.split.balanced and self.rank):
            return self._zero
        return torch.stack(losses).sum()

    # Stages ---------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, index: int, x: Tensor | None) -> Tensor:
        self.replicas.begin_microbatch()
        return run_stage(self.model, self.parts.pipeline.split, stage, x, self._inputs[index], self.dtype)

    # Update ---------------------------------------------------------------------------------------------------

    def _norm(self, op: Op) -> None:
        """One collective for the norm, the loss, the wish to stop and the routers' counts; replicas count once."""
        self._runtime.finish()
        square = self._zero
        for bucket in range(self.replicas.buckets):
            for unit in self.replicas.units(bucket):
                if unit.counted:
                    square = square + sum_of_squares(unit.grad)
        mine = torch.stack((square, self._counted(self._runtime), self._stop)).double()
        routed = collect(self.model, self.device)  # of all layers, those of other stages zero
        if routed is not None:
            mine = torch.cat((mine, routed.flatten()))
        # Nobody waits for this one inside the step. Filled in by kernels: a copy would make the host wait for the GPU.
        worst = [torch.full((), value, dtype=torch.float64, device=self.device) for value in self._watched()]
        self._worst = all_reduce(torch.stack(worst), self.mesh.axis("world"), "max") if worst else Handle(mine[:0])
        whole = all_reduce(mine, self.mesh.axis("world")).wait()
        total = whole[:3].to(self._zero.dtype)
        self._grad_norm, self._loss, self._stop = total[0].sqrt(), total[1], total[2]
        self._skip = (~torch.isfinite(total).all()).float()
        self._routed = whole[3:].view_as(routed) if routed is not None else None
        if self._routed is not None:
            rebalance(self.model, self._routed, self._skip)
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
