"""What a run does every `eval.every` steps."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...parallel.comm.collectives import all_reduce
from ..data.loader import heldout_batches
from ..metrics.evaluation import HELD_OUT_LOSS, on_one_line, sample_metric
from ..metrics.report import Report
from ..pipeline.programs import evaluation_program
from ..session import Session
from ..text.samples import PromptSampler
from .outputs import Outputs


class Evaluator:
    """Evaluates, on all ranks.

    Args:
        session: of this rank, with its data.
    """

    def __init__(self, session: Session) -> None:
        self._cfg, self._mesh, self._device = session.cfg, session.mesh, session.device
        self._stepper, self._data, self._dp = session.stepper, session.data, session.mesh.axis("dp")
        program = session.program
        self._program = evaluation_program(session.cfg, session.parts.pipeline, program.microbatches)
        self.sampler: PromptSampler | None = None
        """Continues `eval.prompts`, where there are some."""

    def run(self, step: int, outputs: Outputs | None) -> dict[str, Any] | None:
        """The mean loss over the held-out split, which is the same in every layout, and what the model makes of the
        prompts.

        Returns:
            Step and loss; None where the loss is no finite number.
        """
        loss = self._loss()
        if outputs is not None:
            outputs.events.log("evaluation", step=step, loss=loss, perplexity=math.exp(min(loss, 50)))
            outputs.sinks.add(Report.of(step, [(HELD_OUT_LOSS, loss)]))
        self._sample(step, outputs)
        return {"step": step, "loss": loss} if math.isfinite(loss) else None

    @torch.no_grad()
    def _loss(self) -> float:
        train, data = self._cfg.train, self._data
        assert data is not None
        sums = self._stepper.sums
        totals = torch.zeros(sums.words + 1, dtype=torch.float64, device=self._device)
        steps = heldout_batches(
            data.heldout,
            steps=self._cfg.eval.steps,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            dp_rank=self._dp.rank,
            dp_size=self._dp.size,
        )
        for batches in steps:
            totals[:-1] += self._stepper.evaluate(batches, self._program)
            if self._mesh.axis("pp").rank == 0 and self._mesh.axis("tokens").rank == 0:
                totals[-1] += sum(batch.valid for batch in batches)
        all_reduce(totals, self._mesh.axis("world")).wait()
        return (sums.whole(totals[:-1]) / totals[-1]).item()

    def _sample(self, step: int, outputs: Outputs | None) -> None:
        """Continues the prompts, on all ranks."""
        prompts = self._cfg.eval.prompts
        samples = self.sampler(prompts, self._cfg.eval.prompt_tokens) if self.sampler is not None else []
        if outputs is None:
            return
        for number, sample in enumerate(samples):
            found = {"prompt": sample.prompt, "text": sample.text, "tokens": list(sample.tokens)}
            outputs.events.log("sample", step=step, **found)
            shown = on_one_line(sample.prompt, sample.text)
            outputs.sinks.add(Report.of(step, [(sample_metric(number), shown)]))
