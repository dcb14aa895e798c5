"""The step loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..configs.errors import UserError
from ..parallel.comm.collectives import all_reduce
from ..parallel.record import kinds
from ..parallel.record.device_clock import DeviceClock
from ..parallel.record.garbage import recorded_collections
from .checkpoint.checkpointer import Checkpointer
from .checkpoint.last_save import still_written, wait_for_last
from .checkpoint.same_run import RunProgress, facts, run_problems
from .checkpoint.state import all_tensors
from .data.dataset import Microbatch
from .data.loader import Loader, heldout_batches
from .metrics.evaluation import HELD_OUT_LOSS, on_one_line, sample_metric
from .metrics.module_spans import ModuleSpans
from .metrics.profiling import Profiler
from .metrics.readings.protocol import OnRank, RunFacts, StepDone
from .metrics.readings.registry import Readings
from .metrics.report import Report
from .metrics.rows import RowExchange
from .metrics.save_alerts import save_alerts
from .metrics.sinks import EventLog, SinkSet
from .numerics.bad_steps import NON_FINITE, BadSteps
from .numerics.corrupted import check_before_save, corrupted_error
from .numerics.loss_table import loss_shares
from .optim.learning_rate import learning_rate
from .outcome import StepResult
from .pipeline.programs import evaluation_program
from .processes.signals import StopRequest
from .run_folder import RunFile
from .session import Session, row_exchange
from .text.samples import PromptSampler
from .text.tokenizer_files import TokenizerFiles


@dataclass(frozen=True)
class Outputs:
    """Where rank 0 reports; the other ranks have none."""

    sinks: SinkSet
    events: EventLog


@dataclass(frozen=True)
class _Issued:
    """A step whose numbers may still be on their way from the device."""

    step: int
    result: StepResult
    lr: float
    batches: Sequence[Microbatch]
    """This rank's own."""
    valid: int
    pairs: float

    @property
    def own_pairs(self) -> float:
        """Attention pairs of this rank's own microbatches."""
        return sum(batch.pairs for batch in self.batches)


class Trainer:
    """Trains one rank.

    Args:
        session: this rank's, opened with the job's data and a peak.
        checkpointer: of the run's checkpoints.
        run_dir: the run's folder.
        rows: brings to the first rank where the others' time went; none: it knows of its own alone.
    """

    def __init__(
        self, session: Session, checkpointer: Checkpointer, *, run_dir: Path, rows: RowExchange | None = None
    ) -> None:
        if session.data is None or session.peak is None:
            raise ValueError("training needs a session with data and a peak")
        self.cfg, self.mesh, self.parts, self.data = session.cfg, session.mesh, session.parts, session.data
        self.optimizer, self.program, self.stepper = session.optimizer, session.program, session.stepper
        self.overlap, self.device, self.checkpointer = session.overlap, session.device, checkpointer
        self.vitals = session.mesh.recorder.vitals
        cfg, mesh = self.cfg, self.mesh
        self.dp, self._cp = mesh.axis("dp"), mesh.axis("cp").size
        microbatches = self.program.microbatches
        self._evaluation = evaluation_program(cfg, self.parts.pipeline, microbatches) if cfg.eval.every else None
        self.peak = session.peak
        world, device = mesh.degrees.world, str(self.device)
        self.rows = rows or row_exchange(session)
        self.readings = Readings(
            RunFacts(
                cfg=cfg,
                devices=world,
                device=device,
                peak_tflops=self.peak.tflops,
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
        self.sampler: PromptSampler | None = None
        """Continues `eval.prompts`, where there are some."""
        self.step = self.tokens = self.skipped = 0
        """Since the start of training."""
        self._evaluated: dict[str, Any] | None = None
        """Step and loss of the last evaluation, on every rank."""
        self._bad = BadSteps(cfg, self.stepper, self.rows.hosts)
        self._stopping = False
        self._waiting: _Issued | None = None
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
        state = self.checkpointer.state(path)
        problems = run_problems(state, self.cfg, path, self.data.fingerprint)
        if problems:
            raise UserError(*problems)
        tensors = all_tensors(self.parts, self.optimizer)
        self.checkpointer.load(path, tensors)
        self.optimizer.loaded(tensors)
        self.parts.replicas.sync_params()
        if self.stepper.guard is not None:
            self.stepper.guard.forget()
        was = RunProgress.of(state, path)
        self.step, self.tokens, self.skipped = was.step, was.tokens, was.skipped
        self.stepper.updates.fill_(float(was.updates))

    def save(self, *, waits: bool = True) -> None:
        """Saves the state after `self.step` steps.

        Args:
            waits: for the save before; else this one is passed over while any rank still writes that.
        """
        self._drain()
        check_before_save(self.stepper.guard, self.mesh, self.step, self.checkpointer.directory, self._event)
        with self._recorded(kinds.SAVE), self.vitals.phase("save"):
            if waits or not still_written(self.checkpointer, self.mesh.axis("world"), self.device):
                self._save()
            else:
                self.checkpointer.pass_over(self.step)

    def _save(self) -> None:
        if self.checkpointer.newest == self.step:
            return
        updates = int(self.stepper.updates.item())
        done = RunProgress(self.step, updates, self.tokens, self.skipped)
        state = done.as_dict() | facts(self.cfg, self.data.fingerprint) | {"tokenizer": self.tokenizer.state}
        state |= {} if self._evaluated is None else {"evaluation": self._evaluated}
        self.checkpointer.save(self.step, all_tensors(self.parts, self.optimizer), state)

    def train(self, outputs: Outputs | None, stop: StopRequest) -> bool:
        """Trains to the last step or until the ranks were asked to stop; True if it went to the end."""
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
        with closing(self.readings), closing(self.rows), recorded_collections(self.mesh.recorder):
            with loader:
                self.vitals.enter("first step")
                while self.step < train.steps and not stopped:
                    stopped = self._one(loader, stop)
                    self.mesh.abort.check("the next step", 0.0)
                    self.vitals.enter("step")
            self._drain()
        self.vitals.enter("end")
        self.parts.replicas.wait_gathers()
        if cfg.checkpoint.final or stopped or self._due(cfg.checkpoint.every):
            self.save()
        try:
            with self.vitals.phase("save"):
                wait_for_last(self.checkpointer, self.step)
        finally:
            self._tell_of_saves()
        return not stopped

    def _tell_of_saves(self) -> None:
        """Tells trackers of saves that failed, and of those that were passed over."""
        unheard = self.checkpointer.telling.unheard()
        if unheard and self._outputs is not None:
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
            with self.overlap.step():
                mine = OnRank(step=self.step + 1, data_s=loader.wait_s, silent_s=self.vitals.longest_silence_s)
                watched = partial(self.readings.watch, mine)
                result = self.stepper.run(self.step, batches, valid, lr, stop=stop.requested, watched=watched)
        self.step += 1
        if self.device.type == "cuda":
            self._drain()  # the previous step's numbers: the host stays one step ahead of the device
        self._waiting = _Issued(self.step, result, lr, batches, valid, pairs)
        if self.device.type == "cpu" or self._due(cfg.eval.every) or self._due(cfg.checkpoint.every):
            self._drain()
        if self._due(cfg.eval.every):
            if self._device_clock is not None:
                self._device_clock.end_step(self.step - 1)
            with self._recorded(kinds.EVALUATE), self.vitals.phase("evaluation"):
                self._evaluate()
            self._clock = time.monotonic_ns()
        if self._due(cfg.checkpoint.every) and self.step < cfg.train.steps:
            self.save(waits=False)
        return self._stopping

    def _recorded(self, kind: str) -> AbstractContextManager[object]:
        recorder = self.mesh.recorder
        return recorder.span(recorder.intern(kind))

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _drain(self) -> None:
        """Reads and reports the step that was issued last, if it was not yet."""
        issued, self._waiting = self._waiting, None
        if issued is None:
            return
        result = issued.result
        with self._recorded(kinds.DRAIN):
            self._landed()
            told = (result.loss, result.grad_norm, result.skipped, result.corrupted, result.stop)
            numbers = torch.stack([x.double() for x in told])
            loss, norm, skipped, corrupted, stop, *rest = torch.cat((numbers, result.worst.wait())).tolist()
        if corrupted:
            raise corrupted_error(self.stepper.guard, self.mesh, issued.step, self.checkpointer.directory, self._event)
        watched = self.readings.watched
        worst, most, table = rest[:watched], rest[watched], rest[watched + 1 :]
        before, self._clock = self._clock, time.monotonic_ns()
        seconds = max(self._clock - before, 1) / 1e9
        self._stopping = stop > 0
        self.tokens += self._tokens
        self.skipped += bool(skipped)
        with self._recorded(kinds.REPORT):
            self._divide(issued, before)
            if self._outputs is not None:
                done = self._done(issued, loss, norm, bool(skipped), seconds, loss_shares(table, self._cp))
                done = replace(done, loss_max_rank=most)
                report = self.readings.step(done, worst)
                self._outputs.sinks.log(report)
                self._tell(report)
                self._tell_of_saves()
        if skipped:
            self._look_into(issued)
        else:
            self._bad.good()

    def _tell(self, report: Report) -> None:
        """Alerts become events."""
        if self._outputs is not None:
            for alert in report.alerts:
                self._outputs.events.log(alert.event, **alert.fields)

    def _look_into(self, issued: _Issued) -> None:
        """After a bad step: where it began, and whether it is the last one."""
        if self._device_clock is not None:
            self._device_clock.end_step(self.step - 1)
        with self._recorded(kinds.EVALUATE), self.vitals.phase("evaluation"):
            alert = self._bad.bad(issued.step - 1, issued.batches, issued.valid)
        if alert is not None and self._outputs is not None:
            report = Report.of(issued.step, [(NON_FINITE, alert)])
            self._outputs.sinks.add(report)
            self._tell(report)
        self._clock = time.monotonic_ns()
        self._bad.check()

    @property
    def _event(self) -> Callable[..., None] | None:
        """Logs an event, on the rank that reports."""
        return self._outputs.events.log if self._outputs is not None else None

    def _landed(self) -> None:
        """On a GPU: waits until what was issued has run, in a way that an abort can end."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.mesh.abort.until("the device", event.query)

    def _divide(self, issued: _Issued, before: int) -> None:
        """Divides this rank's step into parts; on a device the one before, of which all times are there by now."""
        if self._device_clock is None:
            self.rows.step(issued.step, before, self._clock, issued.own_pairs)
            return
        self._device_clock.settle(self.mesh.recorder)
        window = self._device_clock.window(issued.step - 2)
        if window is not None:
            self.rows.step(issued.step - 1, *window, self._pairs_before)
        self._pairs_before = issued.own_pairs

    def _done(
        self, issued: _Issued, loss: float, norm: float, skipped: bool, seconds: float, losses: tuple[float, ...]
    ) -> StepDone:
        moe = issued.result.moe
        return StepDone(
            step=issued.step,
            loss=loss,
            grad_norm=norm,
            lr=issued.lr,
            skipped=skipped,
            skips=self.skipped,
            tokens=self._tokens,
            tokens_seen=self.tokens,
            valid=issued.valid,
            pairs=issued.pairs,
            seconds=seconds,
            losses=losses,
            routed=None if moe is None else moe.cpu().numpy(),
            rows=self.rows.collect(issued.step),
        )

    @property
    def _tokens(self) -> int:
        return self.cfg.train.global_batch * self.cfg.train.seq_len

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over the held-out split: the same sequences each time and in every layout."""
        train = self.cfg.train
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        steps = heldout_batches(
            self.data.heldout,
            steps=self.cfg.eval.steps,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            dp_rank=self.dp.rank,
            dp_size=self.dp.size,
        )
        for batches in steps:
            assert self._evaluation is not None
            totals[0] += self.stepper.evaluate(batches, self._evaluation)
            if self.mesh.axis("pp").rank == 0 and self.mesh.axis("tokens").rank == 0:
                totals[1] += sum(batch.valid for batch in batches)
        all_reduce(totals, self.mesh.axis("world")).wait()
        loss = (totals[0] / totals[1]).item()
        self._evaluated = {"step": self.step, "loss": loss} if math.isfinite(loss) else None
        if self._outputs is not None:
            self._outputs.events.log("evaluation", step=self.step, loss=loss, perplexity=math.exp(min(loss, 50)))
            self._outputs.sinks.add(Report.of(self.step, [(HELD_OUT_LOSS, loss)]))
        self._sample()

    def _sample(self) -> None:
        """Continues the prompts, on all ranks."""
        prompts = self.cfg.eval.prompts
        samples = self.sampler(prompts, self.cfg.eval.prompt_tokens) if self.sampler is not None else []
        if self._outputs is None:
            return
        for number, sample in enumerate(samples):
            found = {"prompt": sample.prompt, "text": sample.text, "tokens": list(sample.tokens)}
            self._outputs.events.log("sample", step=self.step, **found)
            shown = on_one_line(sample.prompt, sample.text)
            self._outputs.sinks.add(Report.of(self.step, [(sample_metric(number), shown)]))
