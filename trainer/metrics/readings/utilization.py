"""How much of what the devices could do the model used: docs/mfu.md."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ....models.costs.flops import flops_per_step, fp8_flops
from ....models.costs.kept import Choice
from ....models.costs.recompute import flops_again
from ...pipeline.programs import Pipeline
from ..formats import fixed
from ..metric import Column, Metric
from .protocol import Reading, RunFacts, StepDone


def per_peak(run: RunFacts, seconds: float) -> float | None:
    """What a FLOP of a step of so many seconds is of all that the job's devices could do in it; None: not known."""
    return 1.0 / (seconds * run.devices) / (run.peak_tflops * 1e12) if run.peak_tflops else None


class UtilizationReading(Reading):
    """Model FLOPs over time and over the peak; with packed documents these are the FLOPs of the step's own pairs."""

    metrics = (
        Metric(
            "mfu",
            "model FLOPs with unmasked attention only (the convention of NVIDIA's published figures), over peak",
            unit="fraction of 1",
            tracker="perf/mfu",
            column=Column("MFU", 6, lambda share: fixed(100 * share, 5, 2) + "%", colour="32", order=50, unknown="n/a"),
        ),
        Metric(
            "mfu_full",
            "with the full attention square (torchtitan's convention)",
            unit="fraction of 1",
            tracker="perf/mfu_full",
        ),
        Metric(
            "mfu_fp8",
            "as `mfu`, each product over the peak of its own precision (`train.fp8`)",
            unit="fraction of 1",
            tracker="perf/mfu_fp8",
        ),
        Metric("hfu", "as `mfu`, with recomputation", unit="fraction of 1", tracker="perf/hfu"),
        Metric(
            "tflops_per_device",
            "model FLOPs as in `mfu`",
            unit="TFLOP/s",
            tracker="perf/tflops_per_gpu",
            column=Column("TFLOP/s", 7, lambda rate: fixed(rate, 7, 3), colour="35", order=60),
        ),
        Metric("peak_tflops", "of one device", unit="TFLOP/s"),
    )

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        self._known = (0, 0.0), (0.0, 0.0, 0.0)

    @cached_property
    def _remade(self) -> Mapping[int, Choice]:
        return Pipeline.of(self.run.cfg).remade

    def _flops(self, tokens: int, pairs: float, square: float) -> tuple[float, float, float]:
        """Model FLOPs, those of recomputation, and with the full attention square; worked out anew only where steps
        differ, as with packed documents."""
        if self._known[0] != (tokens, pairs):
            model = self.run.cfg.model
            again = flops_again(model, tokens, pairs, self._remade)
            found = flops_per_step(model, tokens, pairs), again, flops_per_step(model, tokens, square)
            self._known = (tokens, pairs), found
        return self._known[1]

    def step(self, done: StepDone) -> Mapping[str, Any]:
        cfg, share = self.run.cfg, per_peak(self.run, done.seconds)
        square = cfg.train.global_batch * cfg.train.seq_len**2
        model_flops, again, full = self._flops(done.tokens, done.pairs, square)
        found = {
            "tflops_per_device": model_flops * (1.0 / (done.seconds * self.run.devices)) / 1e12,
            "peak_tflops": self.run.peak_tflops,
        }
        if share is None:
            return found
        return found | {
            "mfu": model_flops * share,
            "mfu_fp8": self._of_both_peaks(model_flops, done.tokens, share),
            "mfu_full": full * share,
            "hfu": (model_flops + again) * share,
        }

    def _of_both_peaks(self, model_flops: float, tokens: int, share: float) -> float | None:
        """Without products in 8 bits there is one peak, and `mfu` tells."""
        cfg, peak, fast = self.run.cfg, self.run.peak_tflops, self.run.peak_fp8_tflops
        if cfg.train.fp8 == "none" or peak is None or fast is None:
            return None
        eight_bit = fp8_flops(cfg.model, tokens, cfg.train.fp8)
        return (model_flops - eight_bit + eight_bit * peak / fast) * share
