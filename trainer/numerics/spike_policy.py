"""Steps that are held back as spikes, run again and then redone, left out, rewound or stopped at: docs/numerics.md.

A step above a limit is decided inside the collective of its norm, on the device, by all ranks alike, and changes
nothing. So the state that it began from is still there, and the step can be run as often as it takes:

    run ─ held ─ run again ─┬─ normal: that run was the step's update                     (transient)
                            └─ held ─ dealt to other ranks, held whatever comes ─┬─ other numbers    (persistent)
                                                                                 └─ the same numbers (data)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ...configs.schema import Config
from ...parallel.comm.collectives import all_reduce
from ...parallel.kernels.upload import Download
from ..data.dataset import Microbatch, Split
from ..data.loader import dealt
from ..metrics.readings.spikes import SpikeFinder, spike_finders, spike_words
from ..outcome import StepResult
from ..step import Stepper
from .loss_table import loss_shares
from .spike_verdict import RunNumbers, SpikeVerdict, judge_spike

_NOTHING_PASSES = (float("-inf"), float("-inf"))


class SpikeError(RuntimeError):
    """The run ends at a spike, or a rank computes what others do not."""


class SpikePolicy:
    """Runs the steps of one rank, as `faults.numerics.on_spike` says; all ranks together.

    Args:
        cfg: the job.
        stepper: runs its steps.
        split: what is trained on.
        rewind: takes the state of the newest checkpoint; which one; none: there is none.
    """

    def __init__(
        self,
        cfg: Config,
        stepper: Stepper,
        split: Split,
        rewind: Callable[[], Path | None],
    ) -> None:
        numerics = cfg.faults.numerics
        self._cfg, self._stepper, self._split, self._rewind = cfg, stepper, split, rewind
        self._do = numerics.on_spike if numerics.spikes else "tell"
        self._finders: dict[str, SpikeFinder] = spike_finders()
        self.whole = True
        """Whether the state of this rank is one after a step, when none is under way: not while it goes back."""

    def run(
        self,
        step: int,
        batches: Sequence[Microbatch],
        valid: int,
        lr: float,
        *,
        wishes: tuple[bool, bool] = (False, False),
        watched: Callable[[], Sequence[float]] = tuple,
    ) -> StepResult:
        """As `Stepper.run`.

        Raises:
            SpikeError: here the run ends.
        """
        run = partial(self._stepper.run, step, valid=valid, lr=lr, wishes=wishes, watched=watched)
        if self._do == "tell":
            return run(batches)
        limits = self._finders["loss"].limit, self._finders["grad_norm"].limit
        result = run(batches, limits=limits)
        first = self._numbers(result)
        if not first.held:
            self._learn(first)
            return result
        found = self._found(first)
        self._stepper.result = None  # whoever is interrupted from here on has not done the step
        result = run(batches, limits=limits)
        again, dp = self._numbers(result), self._stepper.mesh.axis("dp")
        moved = None
        if again.held and dp.size > 1:
            self._stepper.result = None
            theirs = dealt(self._split, self._cfg.train, dp.size, step, (dp.rank + 1) % dp.size)
            moved = self._numbers(run(theirs, limits=_NOTHING_PASSES))
        verdict = judge_spike(found, first, again, moved, dp.size)
        if verdict.cause == "transient":
            self._learn(again)
            return replace(result, spike=replace(verdict, did="trained with that run"))
        self._stepper.result = None
        self._learn(again)
        return self._act(step, verdict, result, partial(run, batches))

    def _act(self, step: int, verdict: SpikeVerdict, held: StepResult, run: Callable[[], StepResult]) -> StepResult:
        """A spike that repeats; `run` trains with it."""
        if verdict.cause == "persistent" or self._do == "stop":
            raise self._error(step, verdict)
        if self._do == "keep":
            return replace(run(), spike=replace(verdict, did="trained with all the same"))
        did = "left out"
        if self._do == "rewind":
            self.whole = False
            path = self._rewind()
            self._stepper.mesh.gather_objects(None)  # nobody has done the step before all have gone back
            self.whole = True
            did += "; there is no checkpoint to go back to" if path is None else f", with the state of {path}"
        self._stepper.result = held
        return replace(held, spike=replace(verdict, did=did))

    def _error(self, step: int, verdict: SpikeVerdict) -> SpikeError:
        """Of this rank. Where it is known which data parallel rank is at fault, the others first wait for its ranks'
        end: so that is the first one, and a job that recovers replaces them."""
        batch, mesh = self._cfg.train.global_batch, self._stepper.mesh
        samples = f"samples {step * batch}-{(step + 1) * batch - 1}"
        text = f"step {step + 1}: {spike_words(verdict.found)}; {samples}; {verdict.text}"
        if verdict.cause != "persistent":
            return SpikeError(f"{text} (faults.numerics.on_spike=stop)")
        if verdict.dp_rank is None:
            return SpikeError(f"{text}; which one is not known: faults.numerics.canary=true may find it")
        mine = mesh.axis("dp").rank == verdict.dp_rank
        if not mine:
            all_reduce(torch.zeros(1, dtype=torch.float64, device=self._stepper.device), mesh.axis("world")).wait()
        return SpikeError(f"{text}, of data parallel rank {verdict.dp_rank}: leave its devices out or have them tested")

    def _numbers(self, result: StepResult) -> RunNumbers:
        """Of a run that has ended."""
        cp, worst = self._stepper.mesh.axis("cp").size, result.worst.wait()
        told = torch.stack([x.double() for x in (result.loss, result.grad_norm, result.held)])
        numbers = Download(torch.cat((told, worst)))
        if not numbers.landed():
            self._stepper.mesh.abort.until("the device", numbers.landed)
        loss, norm, held, *rest = numbers.tolist()
        count = self._cfg.train.global_batch // self._cfg.train.micro_batch * cp
        return RunNumbers(loss, norm, held > 0, loss_shares(rest[-count:], cp) if len(rest) > count else ())

    def _found(self, first: RunNumbers) -> dict[str, tuple[float, float, float]]:
        """By quantity that is above its limit: value, what was expected, limit."""
        return {
            name: (value, finder.expected, finder.limit)
            for name, value in first.values.items()
            if value > (finder := self._finders[name]).limit
        }

    def _learn(self, numbers: RunNumbers) -> None:
        for name, value in numbers.values.items():
            self._finders[name].step(value)
