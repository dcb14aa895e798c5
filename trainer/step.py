"""One training step: the handlers of the program's operations.

No handler asks the device for a number (layers of experts do, see docs/architecture.md). Loss, gradient norm and the
decision to skip are tensors on the device; the loop reads them after the step was issued.

A step commits at the end of the collective of its NORM operation. Until then it changes nothing that outlives it: what
forward and backward passes leave (graphs, tensors on their way, gradient sums, counts of the routers) is its own, and
`Stepper.reset` drops it. From then on its outcome is decided on every rank that has the sums, and what is left to do is
local: selection biases, the count of updates, and each bucket's update; `reset` does what had not been done yet. Only
the gathers of parameters are not: those are handed out anew when the next session opens.

    F … B … reduce │ NORM: sum over all ranks ║ biases, count │ OPT 0 │ gather 0 │ OPT 1 │ gather 1
                   nothing has changed        ║ commit            goes on where it stopped
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..configs.schema import Config
from ..models.parallelize import close
from ..models.routing.balance import collect_tallies, rebalance
from ..models.sequences import Inputs, Sequences
from ..models.stages import run_stage
from ..parallel.comm.collectives import Handle, all_reduce
from ..parallel.comm.mesh import Mesh
from ..parallel.fingerprints import fingerprinting
from ..parallel.pipeline.execute import Handler, execute
from ..parallel.pipeline.kind import Kind
from ..parallel.pipeline.needs import Kinds
from ..parallel.pipeline.program import Op, Program
from ..parallel.pipeline.runtime import Hidden, Runtime
from ..parallel.recompute import second_runs_in
from ..parallel.record import kinds
from ..parallel.vocab import Look
from .data.dataset import Microbatch
from .inputs import InputMaker, own_mean
from .metrics.live_bytes import LiveBytes
from .numerics.guard import NumericsGuard
from .numerics.loss_table import loss_table
from .optim.optimizer import UpdateScalars
from .optim.states import Optimizer
from .optim.step_sums import StepSums
from .outcome import NOTHING_ASKED, Asked, Outcome, StepResult, outcome_of
from .pipeline.host_copies import HostCopies
from .pipeline.vocab_passes import BalancedVocabulary
from .setup import DTYPES, Parts


@dataclass
class _Step:
    """What the operations of one step, or of one evaluation, hand to each other; nothing of it outlives the step.

    Args:
        number: of the step, from 0 on; −1: an evaluation.
        inputs: of each microbatch.
        lr: learning rate.
        wishes: 1 where this rank was asked to stop, and where it is to leave its mesh.
        asked: what was asked besides.
        losses: of the microbatches, where this rank counts them; none before the last backward pass.
        outcome: none before the commit.
        updated: the buckets that were updated since.
        own_loss: the mean over this rank's own tokens, −∞ where it counts none; none before the norm.
        sequences: what layers know of a microbatch, of the last one that passed a stage: its part-stages share it.
    """

    number: int
    inputs: list[Inputs]
    lr: float
    wishes: tuple[Tensor, Tensor]
    asked: Asked
    losses: Sequence[Tensor] = ()
    outcome: Outcome | None = None
    updated: set[int] = field(default_factory=set)
    own_loss: Tensor | None = None
    sequences: tuple[int, Sequences] | None = None


class Stepper:
    """Runs the programs of one rank.

    An error may leave a step half-way; then `reset` comes first, and a rank that is not alone needs a new session: in
    the old mesh a peer's message of the broken step may still arrive.

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
        self.sums = StepSums.of(cfg, self._zero)
        self.guard = NumericsGuard.of(cfg, parts, optimizer, mesh)
        """Finds bits that changed by themselves; none, where nobody wants to know."""
        self._maker = InputMaker(cfg, mesh, parts.device)
        self._vocabulary: BalancedVocabulary | None = None
        if parts.pipeline.split.balanced:
            barriers = cfg.parallel.pipeline.vocab_barriers
            self._vocabulary = BalancedVocabulary(parts, mesh, barriers, self.dtype, self.inputs)
        self._copies = HostCopies.of(program, parts, mesh, cfg.memory.offload_disk)
        self._runtime = self._make_runtime(program, self._copies)
        self._handlers: dict[Kind, Handler] = {
            **self._runtime.handlers,
            **self.replicas.handlers,
            Kinds.REDUCE: lambda op: self.replicas.reduce(op.index),
            Kinds.NORM: self._norm,
            Kinds.OPTIMIZE: self._optimize,
            Kinds.GATHER: lambda op: self.replicas.gather(op.index),
        }
        self.live = LiveBytes(parts.device) if cfg.log.memory else None
        """Counts what each operation leaves on the device, where the record is to have it."""
        self._evaluation: tuple[Runtime, Program] | None = None
        self._step: _Step | None = None
        """The step or evaluation that is under way or was left half-way."""
        recorder = mesh.recorder
        self._remaking = partial(recorder.span, recorder.intern(kinds.RECOMPUTE), on_device=True)
        self._settling = partial(recorder.span, recorder.intern(kinds.SETTLE))
        self.result: StepResult | None = None
        """Of the step that began last, once it has committed and so is not to be repeated."""
        self.spent = False
        """Whether the mesh may still bring something of a step that was left half-way."""

    @property
    def half_way(self) -> bool:
        """Whether a step or evaluation has begun and not ended."""
        return self._step is not None

    def inputs(self, index: int) -> Inputs:
        """A microbatch of the step under way."""
        return self._now.inputs[index]

    @property
    def _now(self) -> _Step:
        if self._step is None:
            raise RuntimeError("no step is under way")
        return self._step

    def _make_runtime(self, program: Program, copies: HostCopies | None = None) -> Runtime:
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
            offloads=copies.offloads if copies is not None else None,
        )

    def run(
        self,
        step: int,
        batches: Sequence[Microbatch],
        valid: int,
        lr: float,
        *,
        wishes: tuple[bool, bool] = (False, False),
        watched: Callable[[], Sequence[float]] = tuple,
        limits: tuple[float, float] = Asked.limits,
    ) -> StepResult:
        """Trains on this rank's microbatches.

        Args:
            step: 0-based.
            batches: one per microbatch of the program.
            valid: valid tokens of the whole global batch.
            lr: learning rate.
            wishes: whether this rank was asked to stop, and whether to leave its mesh; the ranks agree inside the step.
            watched: numbers of this rank whose largest over all ranks is wanted, as many on each; asked for after
                the last backward pass.
            limits: see `Asked`.

        Raises:
            RuntimeError: the step before was left half-way.
        """
        self._begin(step, batches, 1.0 / max(valid, 1), lr, Asked(wishes, watched, limits))
        self.result = None
        if self.guard is not None:
            self.guard.begin(step)
        self.replicas.start_step(len(batches))
        with (
            nullcontext() if self.live is None else self.live.watching(),
            second_runs_in(self._remaking),
            nullcontext() if self.guard is None else fingerprinting(self.guard.prints),
        ):
            count = None if self.live is None else self.live.count
            execute(self.ops, self._handlers, self.mesh.recorder, count)
        settles = self.guard is not None or self.cfg.memory.offload_optimizer != "none"
        with self._settling() if settles else nullcontext():
            self.optimizer.settle()
            if self.guard is not None:
                self.guard.rest()
        outcome, self._step = self._now.outcome, None
        assert outcome is not None  # the program was checked: it has one NORM
        return outcome.result

    def reset(self, *, lost: bool = False) -> StepResult | None:
        """After a step or evaluation that was left half-way: as before it, or, where it had committed, as after it.

        Waits for nobody. Gathers of parameters that were under way are forgotten: a session that goes on from here
        hands them out anew.

        Args:
            lost: the mesh is given up, whatever was under way.

        Returns:
            The result of a step that had committed; `worst` is then this rank's own. None: repeat it.
        """
        left, self._step = self._step, None
        if left is None:
            if lost:
                self.spent = self.mesh.degrees.world > 1
                self.replicas.clear()
            return None
        self.spent = self.mesh.degrees.world > 1
        if self.guard is not None:
            self.guard.forget()
        for runtime in (self._runtime, *(() if self._evaluation is None else self._evaluation[:1])):
            runtime.clear()
        for store in self.parts.stores.values():
            store.clear()
        if self._vocabulary is not None:
            self._vocabulary.clear()
        if left.outcome is None or bool(left.outcome.result.held):
            collect_tallies(self.model, self.device)  # and forget it
            self.replicas.clear()
            return None
        for op in self.ops:
            if op.kind == Kinds.OPTIMIZE and op.index not in left.updated:
                self._update(op.index, left, left.outcome, alone=self.spent)
        self.optimizer.settle()
        self.replicas.clear()
        return replace(left.outcome.result, worst=Handle(self._own(left)))

    @contextmanager
    def repeated(self, step: int, batches: Sequence[Microbatch], valid: int) -> Iterator[list[Tensor]]:
        """Inside the block a step has run again, on all ranks, up to the gradient's norm: sums of gradients are where
        they were in the step. Nothing of it is kept. Arguments as of `run`.

        Yields:
            The microbatches' losses, where this rank counts them.
        """
        self._begin(step, batches, 1.0 / max(valid, 1))
        self.replicas.start_step(len(batches))
        ops = tuple(op for op in self.ops if op.kind not in (Kinds.NORM, Kinds.OPTIMIZE, Kinds.GATHER))
        execute(ops, self._handlers, self.mesh.recorder)
        self._runtime.finish()
        yield self._losses(self._runtime)
        collect_tallies(self.model, self.device)  # and forget it
        self.replicas.clear()
        self._step = None

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Microbatch], program: Program, look: Look | None = None) -> Tensor:
        """The summed loss of this rank's microbatches, in parts that `sums` makes a whole of; 0 on the ranks that count
        none.

        Args:
            batches: one per microbatch of the program.
            program: forward passes only.
            look: shown the logits, where this rank makes some.

        Raises:
            RuntimeError: the step before was left half-way.
        """
        if self._evaluation is None or self._evaluation[1] is not program:
            self._evaluation = self._make_runtime(program), program
        runtime = self._evaluation[0]
        self._begin(-1, batches, 1.0)
        self._show(look)
        try:
            execute(program.ranks[self.rank], runtime.handlers | self.replicas.handlers, self.mesh.recorder)
            runtime.finish()
        finally:
            self._show(None)
        losses, self._step = self._losses(runtime), None
        return self.sums.losses(losses)

    def _show(self, look: Look | None) -> None:
        self.model.head_op.look = look
        if self._vocabulary is not None:
            self._vocabulary.show(look)

    def close(self) -> None:
        """Ends what runs beside the step; call before the mesh is closed."""
        close(self.model)
        if self._vocabulary is not None:
            self._vocabulary.close()
        if self._copies is not None:
            self._copies.close()
        self.optimizer.close()

    def _begin(
        self, step: int, batches: Sequence[Microbatch], scale: float, lr: float = 0.0, asked: Asked = NOTHING_ASKED
    ) -> None:
        if self._step is not None or self.spent:
            what = "open a new session" if self.spent else "reset it"
            raise RuntimeError(f"a step was left half-way: {what} before the next one")
        inputs = [self._maker.make(batch, step, scale) for batch in batches]
        stop, leave = (torch.full_like(self._zero, float(wish)) for wish in asked.wishes)
        self._step = _Step(step, inputs, lr, (stop, leave), asked)
        if step >= 0:
            self.mesh.recorder.step = step

    def _losses(self, runtime: Runtime) -> list[Tensor]:
        """What this rank adds to the loss, by microbatch: every token's loss enters the global sum once."""
        losses = runtime.losses()
        return [] if self.mesh.axis("tp").rank or (self.parts.pipeline.split.balanced and self.rank) else losses

    def _sum(self, losses: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(losses)).sum() if losses else self._zero

    # Stages ---------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, index: int, x: Tensor | None) -> Tensor:
        self.replicas.begin_microbatch()
        split, inputs = self.parts.pipeline.split, self.inputs(index)
        if self.parts.engine is not None:
            return self.parts.engine(inputs)
        if len(split.layers) == 1:
            return run_stage(self.model, split, stage, x, inputs, self.dtype)
        kept = self._now.sequences
        if kept is None or kept[0] != index:
            kept = self._now.sequences = index, self.model.sequences(inputs, self.dtype)
        return run_stage(self.model, split, stage, x, inputs, self.dtype, kept[1])

    # Update ---------------------------------------------------------------------------------------------------

    def _norm(self, op: Op) -> None:
        """One collective for the norm, the loss, the wish to stop and the routers' counts; replicas count once."""
        now = self._now
        self._runtime.finish()
        units = [unit for bucket in range(self.replicas.buckets) for unit in self.replicas.units(bucket)]
        now.losses = self._losses(self._runtime)
        counted = self._sum(now.losses)
        now.own_loss = own_mean(counted, now.inputs) if now.losses else counted.double() - torch.inf
        squares, losses = self.sums.squares([u.grad for u in units if u.counted]), self.sums.losses(now.losses)
        mine = torch.cat((squares, losses, torch.stack(now.wishes).double()))
        if self.guard is not None:
            mine = torch.cat((mine, self.guard.check(now.number).view(1)))
        routed = collect_tallies(self.model, self.device)  # of all layers, those of other stages zero
        if routed is not None:
            mine = torch.cat((mine, routed.flatten()))
        # Nobody waits for this one inside the step.
        own = self._own(now)
        worst = all_reduce(own, self.mesh.axis("world"), "max") if len(own) else Handle(own)
        whole = self.sums.told(all_reduce(mine, self.mesh.axis("world")).wait())
        clip, dtype = self.cfg.optim.clip, self._zero.dtype
        now.outcome = outcome_of(whole, worst, routed, self.guard, clip=clip, dtype=dtype, limits=now.asked.limits)
        self._commit(now.outcome.result)

    def _own(self, step: _Step) -> Tensor:
        """What is watched of this rank. Filled in by kernels: a copy would make the host wait for the GPU."""
        own = [torch.full((), value, dtype=torch.float64, device=self.device) for value in step.asked.watched()]
        own += [step.own_loss] if own and step.own_loss is not None else []
        if not own:
            return torch.empty(0, dtype=torch.float64, device=self.device)
        return torch.cat((torch.stack(own), loss_table(step.losses, len(step.inputs), self.mesh, self.device)))

    def _commit(self, result: StepResult) -> None:
        self.result = result
        if result.moe is not None:
            rebalance(self.model, result.moe, result.skipped)
        self.updates = self.updates + (1 - result.skipped)

    def _optimize(self, op: Op) -> None:
        now = self._now
        assert now.outcome is not None
        self._update(op.index, now, now.outcome)

    def _update(self, bucket: int, step: _Step, outcome: Outcome, *, alone: bool = False) -> None:
        now = UpdateScalars(step.lr, outcome.factor, outcome.result.skipped, self.updates)
        self.optimizer.step(self.replicas.units(bucket), now, alone=alone)
        step.updated.add(bucket)
