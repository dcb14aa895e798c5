"""The step loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configs.errors import UserError
from ..parallel.global_tensor import GlobalTensor
from ..parallel.kernels.upload import Download
from ..parallel.record import kinds
from ..parallel.record.device_clock import DeviceClock
from ..parallel.record.garbage import recorded_collections
from .checkpoint.checkpointer import Checkpointer
from .checkpoint.same_run import RunProgress, run_problems, run_state
from .checkpoint.state import all_tensors
from .checkpoint.tiers.tiers import Tiers, still_written
from .data.loader import Loader
from .job.evaluator import Evaluator
from .job.loading import rewound, take_state
from .job.outputs import Outputs
from .metrics.module_spans import ModuleSpans
from .metrics.profiling import Profiler
from .metrics.readings.protocol import OnRank, RunFacts, StepDone
from .metrics.readings.registry import Readings
from .metrics.report import Report
from .metrics.rows import RowExchange, is_shown
from .metrics.save_alerts import save_alerts
from .numerics.bad_steps import NON_FINITE, BadSteps
from .numerics.corrupted import check_before_save, corrupted_error
from .numerics.loss_table import loss_shares
from .numerics.spike_policy import SpikePolicy
from .optim.learning_rate import learning_rate
from .outcome import IssuedStep, StepResult, numbers_of
from .processes.failure import is_loss
from .processes.signals import StopRequest
from .recovery.keeper import SnapshotKeeper
from .recovery.plan import PlannedChange
from .recovery.point import RunPoint
from .run_folder import RunFile
from .session import Session, row_exchange
from .text.tokenizer_files import TokenizerFiles


class Trainer:
    """Trains one rank.

    Args:
        session: this rank's, opened with the job's data and a peak.
        checkpointer: of the run's checkpoints.
        run_dir: the run's folder.
        rows: brings to the first rank where the others' time went; none: it knows of its own alone.
        keeper: keeps copies of the state, for a job that goes on after a fault.
        local: of the checkpoints that each node keeps for itself.
    """

    def __init__(
        self,
        session: Session,
        checkpointer: Checkpointer,
        *,
        run_dir: Path,
        rows: RowExchange | None = None,
        keeper: SnapshotKeeper | None = None,
        local: Checkpointer | None = None,
    ) -> None:
        if session.data is None or session.peak is None:
            raise ValueError("training needs a session with data and a peak")
        self.cfg, self.mesh, self.parts, self.data = session.cfg, session.mesh, session.parts, session.data
        self.optimizer, self.program, self.stepper = session.optimizer, session.program, session.stepper
        self.overlap, self.device, self.checkpointer = session.overlap, session.device, checkpointer
        self.tiers, self.vitals = Tiers(checkpointer, local), session.mesh.recorder.vitals
        cfg, mesh = self.cfg, self.mesh
        self.dp, self._cp = mesh.axis("dp"), mesh.axis("cp").size
        self.evaluator = Evaluator(session) if cfg.eval.every else None
        self._keeper, self.peak = keeper, session.peak
        self.rows = rows or row_exchange(session)
        self.readings = Readings(
            RunFacts(
                cfg=cfg,
                devices=mesh.degrees.world,
                device=str(self.device),
                peak_tflops=self.peak.tflops,
                peak_fp8_tflops=self.peak.fp8,
                ceiling_tflops=self.peak.ceiling or self.peak.tflops,
                program=self.program,
                hosts=self.rows.hosts,
                epoch=mesh.epoch,
                locate=self.data.places,
            )
        )
        self.profiler = Profiler(cfg.log.profile, run_dir / RunFile.PROFILE, mesh.rank)
        self.modules = ModuleSpans(self.parts.model, mesh.recorder, cfg.log.modules)
        self.tokenizer = TokenizerFiles()
        """What the run's checkpoints say about text."""
        self.step = self.tokens = self.skipped = 0
        """Since the start of training."""
        self._evaluated: dict[str, Any] | None = None
        """Step and loss of the last evaluation, on every rank."""
        self._bad = BadSteps(cfg, self.stepper, self.rows.hosts)
        rewind = partial(rewound, self.tiers, self.tensors, self.stepper)
        self._spikes = SpikePolicy(cfg, self.stepper, self.data.train, rewind)
        self._stopping = self._leaving = False
        self._goes_on = False
        """Whether the state is one in which a fault has ended the mesh before."""
        self.left_at: RunPoint | None = None
        """How far the state of this rank is, after others were lost; none: it is not the state after a step."""
        self._begun: Callable[[StepResult], IssuedStep] | None = None
        """Makes what there is to tell of the step that is under way."""
        self._waiting: IssuedStep | None = None
        self._outputs: Outputs | None = None
        clock = mesh.recorder.device
        self._device_clock = clock if isinstance(clock, DeviceClock) else None
        self._pairs_before = 0.0
        self._clock = time.monotonic_ns()
        """When the numbers of the step before were read."""

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint, written under any layout.

        Raises:
            UserError: the checkpoint does not fit the model or was trained on other data.
        """
        self.vitals.enter("load")
        problems = run_problems(self.tiers.of(path).state(path), self.cfg, path, self.data.fingerprint)
        if problems:
            raise UserError(*problems)
        was = take_state(self.tiers.of(path), path, self.tensors(), self.stepper)
        self.step, self.tokens, self.skipped = was.step, was.tokens, was.skipped

    @property
    def point(self) -> RunPoint:
        """How far the state is."""
        done = RunProgress(self.step, int(self.stepper.updates.item()), self.tokens, self.skipped)
        return RunPoint(done, self._evaluated, self._bad.row)

    def go_on(self, point: RunPoint) -> None:
        """Goes on from a state that the ranks have, in a new mesh."""
        done, self._goes_on = point.progress, True
        self.tiers.look_for(point.step)
        self.step, self.tokens, self.skipped = done.step, done.tokens, done.skipped
        self._evaluated, self._bad.row = point.evaluated, point.bad

    def save(self) -> None:
        """Saves the state after `self.step` steps, where all ranks see it; the save before is waited for."""
        self._save(self.checkpointer, waits=True)

    def _save(self, to: Checkpointer, *, waits: bool) -> None:
        """`waits`: for the save before; else this one is passed over while any rank still writes that."""
        self._drain()
        check_before_save(self.stepper.guard, self.mesh, self.step, self.checkpointer.directory, self._event)
        with self._recorded(kinds.SAVE), self.vitals.phase("save"):
            if not waits and still_written(to, self.mesh.axis("world"), self.device):
                to.pass_over(self.step)
            elif to.newest != self.step:
                state = run_state(self.cfg, self.data.fingerprint, self.point.progress, self._evaluated)
                to.save(self.step, self.tensors(), state | {"tokenizer": self.tokenizer.state})

    def tensors(self) -> dict[str, GlobalTensor]:
        """This rank's pieces of what checkpoints hold."""
        return all_tensors(self.parts, self.optimizer)

    def train(self, outputs: Outputs | None, stop: StopRequest) -> bool:
        """Trains to the last step or until the ranks were asked to stop; True if it went to the end. Where all are to
        leave the mesh, it raises PlannedChange."""
        cfg, train = self.cfg, self.cfg.train
        self._outputs = outputs
        loader = Loader(
            self.data.train,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            dp_rank=self.dp.rank,
            dp_size=self.dp.size,
            start_step=self.step,
            steps=train.steps,
            prefetch=cfg.data.prefetch,
            abort=self.mesh.abort,
            vitals=self.vitals,
        )
        stopped = False
        self._clock = time.monotonic_ns()
        with (
            closing(self.readings),
            closing(self.rows),
            recorded_collections(self.mesh.recorder),
            loader,
            self._may_break_off(),
        ):
            if self._goes_on:
                self._after_step()
            self.tiers.prepare(cfg.checkpoint, self.tensors)
            self.vitals.enter("first step")
            while self.step < train.steps and not stopped:
                stopped = self._one(loader, stop)
                if self._leaving and not stopped and self.step < train.steps:
                    raise PlannedChange
                self.mesh.abort.check("the next step", 0.0)
                self.vitals.enter("step")
            self._drain()
        self.vitals.enter("end")
        with self._may_break_off():
            self.parts.replicas.wait_gathers()
            if cfg.checkpoint.final or stopped or self._due(cfg.checkpoint.every):
                self.save()
            try:
                with self.vitals.phase("save"):
                    self.tiers.finish(self.step)
            finally:
                self._tell_of_saves()
        return not stopped

    def _tell_of_saves(self) -> None:
        """Tells trackers of saves that failed, and of those that were passed over."""
        if self._outputs is not None and (unheard := self.tiers.unheard()):
            self._outputs.sinks.add(save_alerts(self.step, unheard))

    def _one(self, loader: Loader, stop: StopRequest) -> bool:
        cfg = self.cfg
        with self.profiler.step(self.step + 1), self.modules.step(self.step + 1):
            self.mesh.recorder.step = self.step
            if self._device_clock is not None:
                self._device_clock.begin_step(self.step)
            with self._recorded(kinds.DATA):
                batches = next(loader)
            lr = learning_rate(cfg.optim.schedule, cfg.optim.lr, self.step, cfg.train.steps)
            valid, pairs = loader.counts
            self._begun = partial(IssuedStep, self.step + 1, lr=lr, batches=batches, valid=valid, pairs=pairs)
            with self.overlap.step():
                mine = OnRank(step=self.step + 1, data_s=loader.wait_s, silent_s=self.vitals.longest_silence_s)
                watched = partial(self._before_norm, mine)
                wishes = stop.requested, self._keeper is not None and self.vitals.to_leave
                result = self._spikes.run(self.step, batches, valid, lr, wishes=wishes, watched=watched)
        self._count(self._begun(result))
        if self.device.type == "cpu" or self._due(cfg.eval.every) or self._due(cfg.checkpoint.every):
            self._drain()
        if self._keeper is not None:
            with self._recorded(kinds.SNAPSHOT):
                self._keeper.after(self.point, now=self._leaving)
        self._after_step()
        return self._stopping

    def _before_norm(self, mine: OnRank) -> Sequence[float]:
        """What is watched of this rank; asked for after the last backward pass."""
        if self._keeper is not None:
            self._keeper.arrived()
        return self.readings.watch(mine)

    def _count(self, issued: IssuedStep) -> None:
        """A step is done."""
        self.step, self._begun = issued.step, None
        if self.device.type == "cuda":
            issued = replace(issued, numbers=self._numbers(issued))  # queued behind this step, before the next one
            self._drain()  # the previous step's numbers: the host stays one step ahead of the device
        self._waiting = issued

    def _after_step(self) -> None:
        """What is due after the newest step, as far as it was not done before a fault."""
        cfg, evaluated = self.cfg, self._evaluated
        again = self._goes_on and evaluated is not None and evaluated["step"] == self.step
        if self.evaluator is not None and self._due(cfg.eval.every) and self.step and not again:
            if self._device_clock is not None:
                self._device_clock.end_step(self.step - 1)
            with self._recorded(kinds.EVALUATE), self.vitals.phase("evaluation"):
                self._evaluated = self.evaluator.run(self.step, self._outputs)
            self._clock = time.monotonic_ns()
        for each, every in self.tiers.every(cfg.checkpoint):
            if self._due(every) and 0 < self.step < cfg.train.steps:
                self._save(each, waits=False)
        self._goes_on = False

    @contextmanager
    def _may_break_off(self) -> Iterator[None]:
        """Where other ranks are lost inside the block, this rank is at the end of a step after it, if others can take
        their places."""
        try:
            yield
        except Exception as error:
            if self._keeper is not None and is_loss(error):
                self._break_off()
            raise

    def _break_off(self) -> None:
        """Ends alone what a step had committed, and waits for nobody."""
        self.mesh.abort.trigger("other ranks are lost")
        result = self.stepper.reset(lost=True) or self.stepper.result
        if self._begun is not None and result is not None:
            self._count(self._begun(result))
        self._drain(alone=True)
        self.left_at = self.point if self._spikes.whole else None

    def _recorded(self, kind: str) -> AbstractContextManager[object]:
        return self.mesh.recorder.span(self.mesh.recorder.intern(kind))

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _drain(self, *, alone: bool = False) -> None:
        """Reads and reports the step that was issued last, if it was not yet; `alone`: waits for no other rank."""
        issued = self._waiting
        if issued is None:
            return
        watched, moe = self.readings.watched, issued.result.moe
        with self._recorded(kinds.DRAIN):
            worst = torch.full((watched + 1,), -torch.inf, dtype=torch.float64) if alone else None
            numbers = issued.numbers or self._numbers(issued, worst)
            if not numbers.landed():
                self.mesh.abort.until("the device", numbers.landed)
            loss, norm, skipped, corrupted, stop, leave, *rest = numbers.tolist()
        self._waiting = None
        if corrupted:
            raise corrupted_error(self.stepper.guard, self.mesh, issued.step, self.checkpointer.directory, self._event)
        worst, most, rest = rest[:watched], rest[watched], rest[watched + 1 :]
        table = rest[: len(rest) - (0 if moe is None else moe.numel())]
        routed = None if moe is None else np.reshape(rest[len(table) :], moe.shape)
        before, self._clock = self._clock, time.monotonic_ns()
        seconds = max(self._clock - before, 1) / 1e9
        self._stopping, self._leaving = stop > 0, leave > 0
        self.tokens += self._tokens
        self.skipped += bool(skipped)
        with self._recorded(kinds.REPORT):
            if not alone:
                self._divide(issued, before)
            if self._outputs is not None:
                done = self._done(issued, loss, norm, bool(skipped), seconds)
                done = replace(done, losses=loss_shares(table, self._cp), loss_max_rank=most, routed=routed)
                self._outputs.log(self.readings.step(done, worst))
                self._tell_of_saves()
        if issued.result.spike is not None:
            return
        if skipped and alone:
            self._bad.row += 1
        elif skipped:
            self._look_into(issued)
        else:
            self._bad.good()

    def _look_into(self, issued: IssuedStep) -> None:
        """After a bad step: where it began, and whether it is the last one."""
        if self._device_clock is not None:
            self._device_clock.end_step(self.step - 1)
        with self._recorded(kinds.EVALUATE), self.vitals.phase("evaluation"):
            alert = self._bad.bad(issued.step - 1, issued.batches, issued.valid)
        if alert is not None and self._outputs is not None:
            self._outputs.add(Report.of(issued.step, [(NON_FINITE, alert)]))
        self._clock = time.monotonic_ns()
        self._bad.check()

    @property
    def _event(self) -> Callable[..., None] | None:
        """Logs an event, on the rank that reports."""
        return self._outputs.events.log if self._outputs is not None else None

    def _numbers(self, issued: IssuedStep, worst: Tensor | None = None) -> Download:
        """The step's numbers, on their way to the host; `worst`: in place of what all ranks found."""
        return Download(numbers_of(issued.result, issued.result.worst.wait() if worst is None else worst))

    def _divide(self, issued: IssuedStep, before: int) -> None:
        """Divides this rank's step into parts; on a device the one before, of which all times are there by now."""
        due = self._stopping or is_shown(self.cfg, issued.step, alone=self.mesh.degrees.world == 1)
        if self._device_clock is None:
            self.rows.step(issued.step, before, self._clock, issued.own_pairs, due=due)
            return
        self._device_clock.settle(self.mesh.recorder)
        window = self._device_clock.window(issued.step - 2)
        if window is not None:
            self.rows.step(issued.step - 1, *window, self._pairs_before, due=due)
        self._pairs_before = issued.own_pairs

    def _done(self, issued: IssuedStep, loss: float, norm: float, skipped: bool, seconds: float) -> StepDone:
        return StepDone(
            step=issued.step,
            loss=loss,
            grad_norm=norm,
            lr=issued.lr,
            skipped=skipped,
            skips=self.skipped,
            spike=issued.result.spike,
            tokens=self._tokens,
            tokens_seen=self.tokens,
            valid=issued.valid,
            pairs=issued.pairs,
            seconds=seconds,
            rows=self.rows.collect(issued.step),
        )

    @property
    def _tokens(self) -> int:
        return self.cfg.train.global_batch * self.cfg.train.seq_len
